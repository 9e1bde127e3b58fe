"""A plain ZeroMQ program: a REP socket, JSON in, JSON out. Nothing here is Interlock's."""

import argparse
import json

import zmq


def answer(request: dict) -> dict:
    if request.get("action") == "health":
        return {"status": "ok"}
    if request.get("action") == "add":
        return {"status": "ok", "sum": sum(request["numbers"])}
    return {"status": "error", "error": {"code": "unknown-action", "message": "add or health"}}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    socket = zmq.Context().socket(zmq.REP)
    socket.bind(f"tcp://127.0.0.1:{parser.parse_args().port}")
    while True:
        body = socket.recv()
        try:
            reply = answer(json.loads(body))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reply = {"status": "error", "error": {"code": "bad-request", "message": str(error)}}
        socket.send(json.dumps(reply).encode())


if __name__ == "__main__":
    main()
