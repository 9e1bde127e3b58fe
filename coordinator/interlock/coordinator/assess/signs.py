"""What names mean: the libraries and calls by which a source shows that a factor holds. Tables, and their look-up.

A name is resolved first: "zmq.Context().socket" is what `ctx.socket` stands for after `ctx = zmq.Context()`.
"""

from __future__ import annotations

import re

from interlock.coordinator.assess.model import Sign


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Calls that make a socket, or a server that listens on one.
SOCKETS = _words(
    "socket.socket socket.create_server socket.create_connection socket.socketpair socket.fromfd"
    " asyncio.start_server asyncio.start_unix_server asyncio.open_connection asyncio.open_unix_connection"
    " asyncio.streams.start_server asyncio.streams.open_connection"
    " trio.open_tcp_listeners trio.serve_tcp trio.open_tcp_stream trio.socket.socket trio.serve_ssl_over_tcp"
    " anyio.create_tcp_listener anyio.connect_tcp gevent.socket.socket eventlet.listen gevent.server.StreamServer"
    " http.server.HTTPServer http.server.ThreadingHTTPServer xmlrpc.server.SimpleXMLRPCServer"
    " socketserver.TCPServer socketserver.UDPServer socketserver.ThreadingTCPServer socketserver.ThreadingUDPServer"
    " socketserver.UnixStreamServer wsgiref.simple_server.make_server"
    " multiprocessing.connection.Listener multiprocessing.connection.Client"
    " BaseHTTPServer.HTTPServer SocketServer.TCPServer SocketServer.ThreadingTCPServer SocketServer.UDPServer"
    " grpc.server grpc.aio.server grpc.insecure_channel grpc.aio.insecure_channel"
    " websockets.serve websockets.server.serve websockets.connect websockets.sync.server.serve"
    " websocket.create_connection websocket.WebSocketApp uvicorn.run uvicorn.Server hypercorn.trio.serve"
    " hypercorn.asyncio.serve aiohttp.web.run_app aiohttp.web.TCPSite waitress.serve gevent.pywsgi.WSGIServer"
    " flask.Flask().run bottle.run tornado.httpserver.HTTPServer tornado.ioloop.IOLoop.current"
    " twisted.internet.reactor.listenTCP twisted.internet.reactor.connectTCP zmq.Socket zmq.asyncio.Socket zmq.proxy"
    " nng.Rep0 pynng.Rep0 pynng.Req0 pynng.Pub0 pynng.Sub0 pynng.Pair0 zerorpc.Server zerorpc.Client"
)
# Classes that are one of these, if a class of the tree derives from them.
SOCKET_BASES = _words(
    "socketserver.TCPServer socketserver.UDPServer socketserver.ThreadingTCPServer socketserver.ThreadingUDPServer"
    " http.server.HTTPServer http.server.ThreadingHTTPServer socket.socket asyncore.dispatcher asynchat.async_chat"
)
THREAD_BASES = _words(
    "threading.Thread threading.Timer multiprocessing.Process multiprocessing.context.Process"
    " concurrent.futures.ThreadPoolExecutor concurrent.futures.ProcessPoolExecutor PyQt5.QtCore.QThread"
)
# The ends of calls on an event loop, whatever the loop was got from.
LOOP_CALLS: dict[str, Sign] = {
    "create_server": "sockets", "create_unix_server": "sockets", "create_datagram_endpoint": "sockets",
    "create_connection": "sockets", "run_in_executor": "threads", "subprocess_exec": "threads",
}  # fmt: skip
LOOPS = _words(
    "asyncio.get_event_loop() asyncio.get_running_loop() asyncio.new_event_loop() asyncio.events.get_event_loop()"
    " uvloop.new_event_loop()"
)
THREADS = _words(
    "threading.Thread threading.Timer _thread.start_new_thread thread.start_new_thread os.fork os.forkpty os.system"
    " os.popen os.spawnl os.spawnv os.spawnvp os.spawnlp os.posix_spawn os.posix_spawnp pty.fork pty.spawn"
    " concurrent.futures.ThreadPoolExecutor concurrent.futures.ProcessPoolExecutor"
    " concurrent.futures.thread.ThreadPoolExecutor concurrent.futures.process.ProcessPoolExecutor"
    " multiprocessing.Process multiprocessing.Pool multiprocessing.pool.ThreadPool multiprocessing.pool.Pool"
    " multiprocessing.Manager multiprocessing.context.Process multiprocessing.dummy.Pool"
    " subprocess.Popen subprocess.run subprocess.call subprocess.check_call subprocess.check_output"
    " subprocess.getoutput subprocess.getstatusoutput asyncio.create_subprocess_exec asyncio.create_subprocess_shell"
    " asyncio.to_thread trio.run_process trio.lowlevel.open_process trio.to_thread.run_sync"
    " trio.lowlevel.start_thread_soon anyio.to_thread.run_sync anyio.run_process anyio.open_process"
    " schedule.every joblib.Parallel psutil.Popen pexpect.spawn sh.Command PyQt5.QtCore.QThread"
    " apscheduler.schedulers.background.BackgroundScheduler gevent.spawn eventlet.spawn commands.getoutput"
    " pathos.multiprocessing.ProcessingPool ray.init celery.Celery torch.multiprocessing.Process"
    " torch.multiprocessing.spawn"
)
# Of these, what makes the threading of an agent more than simple: processes that share nothing but what is sent.
PROCESSES = _words(
    "os.fork os.forkpty pty.fork multiprocessing.Process multiprocessing.Pool multiprocessing.pool.Pool"
    " multiprocessing.Manager multiprocessing.context.Process concurrent.futures.ProcessPoolExecutor"
    " concurrent.futures.process.ProcessPoolExecutor torch.multiprocessing.Process torch.multiprocessing.spawn ray.init"
)
ASYNC = _words(
    "asyncio.create_task asyncio.gather asyncio.ensure_future asyncio.TaskGroup asyncio.wait asyncio.as_completed"
    " trio.open_nursery anyio.create_task_group curio.TaskGroup"
    " asyncio.tasks.create_task asyncio.run_coroutine_threadsafe"
)
SYNC = _words(
    "threading.Condition threading.Semaphore threading.BoundedSemaphore threading.Barrier multiprocessing.Queue"
    " multiprocessing.Pipe multiprocessing.Value multiprocessing.Array multiprocessing.Lock"
    " multiprocessing.shared_memory.SharedMemory multiprocessing.Condition multiprocessing.Semaphore"
)
# Calls that do not return while the agent works.
SERVING = _words(
    "asyncio.run trio.run anyio.run uvicorn.run aiohttp.web.run_app waitress.serve bottle.run zmq.proxy"
    " flask.Flask().run schedule.run_pending zmq.device tornado.ioloop.IOLoop.current().start"
)
SERVING_ENDS = _words("serve_forever run_forever wait_for_termination start_consuming run_until_complete")
RECEIVING = re.compile(r"recv\w*|accept|poll|select|handle_request|receive\w*|read_message|blpop|get_message|sleep")

DATABASES = _words(
    "sqlite3 aiosqlite redis aioredis psycopg psycopg2 psycopg_pool asyncpg pg8000 sqlalchemy sqlmodel peewee pony"
    " mysql MySQLdb pymysql aiomysql mariadb pymongo motor mongoengine cassandra elasticsearch opensearchpy neo4j"
    " py2neo duckdb chromadb pymilvus qdrant_client weaviate pinecone lancedb"
    " influxdb influxdb_client clickhouse_driver"
    " clickhouse_connect oracledb cx_Oracle pyodbc pymssql ibm_db fdb tinydb plyvel rocksdb lmdb dbm shelve tortoise"
    " databases boto3.dynamodb memcache pymemcache etcd3 happybase snowflake databricks arango"
)
ORMS = _words("sqlalchemy sqlmodel peewee pony mongoengine tortoise")
# Names of these modules that are called, and open nothing.
QUIET = re.compile(r"(Error|Exception|Warning|Interrupt)$")

CONFIG_LOADS = _words(
    "yaml.safe_load yaml.load yaml.full_load yaml.load_all yaml.safe_load_all yaml.unsafe_load ruamel.yaml.YAML().load"
    " ruamel.yaml.safe_load ruamel.yaml.load toml.load toml.loads tomllib.load tomllib.loads tomli.load tomli.loads"
    " tomlkit.load tomlkit.parse rtoml.load pytoml.load"
    " omegaconf.OmegaConf.load dotenv.load_dotenv dotenv.dotenv_values confuse.Configuration hydra.main hydra.compose"
    " dynaconf.Dynaconf configobj.ConfigObj environs.Env().read_env decouple.Config json5.load hjson.load"
    " oyaml.safe_load yaml.YAML().load anyconfig.load pyhocon.ConfigFactory.parse_file configparser.ConfigParser().read"
    " configparser.ConfigParser().read_file configparser.RawConfigParser().read configparser.SafeConfigParser().read"
    " ConfigParser.ConfigParser().read ConfigParser.SafeConfigParser().read ConfigParser.RawConfigParser().read"
)
JSON_LOADS = _words(
    "json.load json.loads ujson.load ujson.loads orjson.loads simplejson.load simplejson.loads msgspec.json.decode"
)
CONFIG_NAME = re.compile(
    r"(?i)(^|[^a-z])(conf(ig(uration)?)?s?|cfg|settings?|options?|prefs|preferences|profile)($|[^a-z])"
)

GPU = _words(
    "torch tensorflow onnxruntime cupy pycuda numba.cuda cuda jax flax tensorrt triton vllm bitsandbytes pynvml"
    " nvidia_smi GPUtil faster_whisper ctranslate2 llama_cpp exllamav2 accelerate torchvision torchaudio"
    " pyopencl cudf cuml rmm nvtx"
)
GPU_MEMORY = re.compile(
    r"empty_cache|(max_)?memory_(allocated|reserved|cached)|set_per_process_memory_fraction|mem_get_info|mem_alloc\w*"
    r"|reset_peak_memory_stats|reset_max_memory_\w+|memory_(stats|summary|snapshot)|caching_allocator_\w+|MemoryPool"
    r"|PinnedMemoryPool|set_allocator|malloc_?managed|cudaMalloc\w*|cudaFree\w*|set_memory_growth|malloc_async"
    r"|set_virtual_device_configuration|set_logical_device_configuration|nvmlDeviceGetMemoryInfo|pagelocked_\w+"
    r"|CUDAPluggableAllocator|ipc_collect|free_all_blocks"
)
GPU_COMPLEX = re.compile(
    r"(DataParallel|DistributedDataParallel|FullyShardedDataParallel|Stream|ExternalStream|CUDAGraph|graph|"
    r"make_graphed_callables|RawKernel|RawModule|ElementwiseKernel|SourceModule|jit|MirroredStrategy|"
    r"MultiWorkerMirroredStrategy|init_process_group|GradScaler|autocast|set_device|pmap|load_inline|Event)$"
)
GPU_COMPLEX_IN = re.compile(
    r"^(torch\.(distributed|cuda|cuda\.amp|nn|nn\.parallel|utils\.cpp_extension)|cupy|pycuda|numba\.cuda"
    r"|tensorflow\.distribute|jax|triton)\b"
)

ZMQ_TYPES = _words("PAIR PUB SUB REQ REP DEALER ROUTER PULL PUSH XPUB XSUB STREAM XREQ XREP SERVER CLIENT RADIO DISH")
HEALTH = re.compile(
    r"/?(api/|v\d+/)*_?(health|healthz|health[_-]?check\w*|healthcheckz?|readyz|livez|readiness|liveness|health_status)/?"
)
HEALTH_NAME = re.compile(
    r"_*((do|run|handle|on|get|check|perform|start|serve|answer|report|reply|is)_)*"
    r"(health|healthz|healthy|health_?checks?|health_status|health_loop|health_server|health_monitor|health_thread"
    r"|health_socket|health_endpoint|health_request|liveness|readiness|health_check_loop|health_state|system_health)"
    r"(_(loop|handler|server|endpoint|thread|request|reply|worker|task|response|status|route))?"
)
HTTP_CALLS = _words("get post put delete patch head request options stream urlopen ws_connect connect Request")
HTTP_HEADS = _words(
    "requests httpx aiohttp urllib urllib2 urllib3 websockets websocket http grpc zerorpc socketio xmlrpc"
)


def call_sign(name: str) -> Sign | None:
    """The sign of a call of this name, where the name alone tells."""
    head, _, rest = name.partition(".")
    if name in SOCKETS:
        return "sockets"
    if head == "zmq" and name.endswith("().socket"):
        return "sockets"
    if name in THREADS or (head == "multiprocessing" and name.startswith("multiprocessing.get_context().")):
        return "threads"
    base, _, last = name.rpartition(".")
    if base in LOOPS and last in LOOP_CALLS:
        return LOOP_CALLS[last]
    if name in ASYNC:
        return "async"
    if name in SYNC:
        return "sync"
    if head in DATABASES and rest and "()" not in name and not QUIET.search(name):
        return "database"
    if head in GPU or base in GPU:
        return gpu_sign(name)
    return None


def gpu_sign(name: str) -> Sign | None:
    last = name.rpartition(".")[2]
    if GPU_MEMORY.fullmatch(last):
        return "gpu-memory"
    if GPU_COMPLEX.search(last) and GPU_COMPLEX_IN.match(name):
        return "gpu-complex"
    return "gpu" if "()" not in name else None
