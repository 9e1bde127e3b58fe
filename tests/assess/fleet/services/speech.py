import torch
import zmq

socket = zmq.Context().socket(zmq.REP)
socket.bind("tcp://*:%d" % 7202)
memory = zmq.Context.instance().socket(zmq.REQ)
memory.connect("tcp://localhost:7201")
model = torch.nn.Linear(2, 2).to("cuda")
torch.cuda.empty_cache()
while True:
    socket.send(socket.recv())
