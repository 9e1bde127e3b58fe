import threading


def begin(target):
    worker = threading.Thread(target=target)
    worker.start()
    return worker


def unused():
    import subprocess

    return subprocess.run(["true"], check=False)
