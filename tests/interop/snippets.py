#!/usr/bin/env python3
"""Runs a receiver of docs/verify/ and sends it what `couch-hookd demo --json` sent, then what it must refuse.

    snippets.py python|node|php PROGRAM [ARGUMENT…]        such as `snippets.py node cargo run --release --locked --quiet --`

What is forged is signed rightly by the `standardwebhooks` package where the signature is not what is wrong.
"""

import datetime
import http.client
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

from standardwebhooks.webhooks import Webhook

FOLDER = pathlib.Path(__file__).parents[2] / "docs/verify"
OTHER_SECRET = "whsec_" + "A" * 43 + "="


def command(language, port):
    return {
        "python": [sys.executable, str(FOLDER / "receiver.py")],
        "node": ["node", str(FOLDER / "receiver.mjs")],
        "php": ["php", "-S", f"127.0.0.1:{port}", str(FOLDER / "receiver.php")],
    }[language]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(port, receiver):
    until = time.monotonic() + 10
    while receiver.poll() is None and time.monotonic() < until:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
    raise AssertionError("the receiver did not start")


def post(port, body, headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("POST", "/", body.encode(), {"content-type": "application/json", **headers})
    status = connection.getresponse().status
    connection.close()
    return status


def signed(secret, body, message_id="msg_1", seconds_ago=0):
    at = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(seconds=seconds_ago)
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": Webhook(secret).sign(message_id, at, body),
    }


def check(port, secret, requests):
    wrong = [request for request in requests if post(port, request["body"], request["headers"]) != 204]
    assert requests and not wrong, f"{len(wrong)} of {len(requests)} refused: {wrong[:1]}"
    body = requests[0]["body"]

    def expect(status, what, headers, body=body):
        found = post(port, body, headers)
        assert found == status, f"{what}: expected {status}, got {found}"

    good = signed(secret, body)
    two = f"v1,{'A' * 43}= {good['webhook-signature']}"
    expect(204, "a request that the package signed", good)
    expect(204, "the second of two signatures", {**good, "webhook-signature": two})
    expect(204, "the second of two secrets", signed(OTHER_SECRET, body))
    expect(401, "a changed body", good, body + " ")
    expect(401, "another id", {**good, "webhook-id": "msg_2"})
    expect(401, "another secret", signed("whsec_" + "B" * 43 + "=", body))
    expect(401, "a request of 400 s ago", signed(secret, body, seconds_ago=400))
    expect(401, "a request from 400 s ahead", signed(secret, body, seconds_ago=-400))
    expect(401, "a timestamp that is none", {**good, "webhook-timestamp": "now"})
    for name in good:
        expect(401, f"no {name}", {other: value for other, value in good.items() if other != name})


def main():
    language, *program = sys.argv[1:]
    demo = [*program, "demo", "--json", "--for", "3s"]
    demo = subprocess.run(demo, stdout=subprocess.PIPE, text=True, timeout=600, check=True).stdout.splitlines()
    first, *requests, _last = [json.loads(line) for line in demo]
    port = free_port()
    environment = {**os.environ, "PORT": str(port), "WEBHOOK_SECRET": f"{first['secret']} {OTHER_SECRET}"}
    with tempfile.TemporaryFile("w+") as output:
        receiver = subprocess.Popen(command(language, port), env=environment, stdout=output, stderr=output)
        try:
            wait_for(port, receiver)
            check(port, first["secret"], requests)
        finally:
            receiver.kill()
            receiver.wait()
            output.seek(0)
            printed = output.read()
    told = [request["webhook_id"] for request in requests if request["webhook_id"] not in printed]
    assert not told, f"not printed: {told[:3]}\n{printed[-2000:]}"
    print(f"{language}: {len(requests)} requests accepted, forgeries refused")


if __name__ == "__main__":
    main()
