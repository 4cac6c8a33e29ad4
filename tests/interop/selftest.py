#!/usr/bin/env python3
"""Shows that verify.py accepts the specification's own example and refuses five forgeries of it."""

import json
import pathlib
import subprocess
import sys

VERIFY = pathlib.Path(__file__).with_name("verify.py")
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
# Standard Webhooks, libraries' common test vector.
GOOD = {
    "headers": {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    },
    "body": '{"test": 2432232314}',
}


def run(requests, secret=SECRET, now="1614265330"):
    text = "".join(json.dumps(request) + "\n" for request in requests)
    command = [sys.executable, str(VERIFY), "--secret", secret, "--now", now]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout.strip()


def forged(**headers):
    return {"headers": {**GOOD["headers"], **headers}, "body": GOOD["body"]}


assert run([GOOD]) == (0, "1 verified, 0 failed"), run([GOOD])
assert run([GOOD, {**GOOD, "body": GOOD["body"] + " "}]) == (1, "1 verified, 1 failed")
assert run([forged(**{"webhook-id": "msg_other"})])[0] == 1
assert run([forged(**{"webhook-timestamp": "1614265331"})])[0] == 1
assert run([GOOD], secret="whsec_" + "AAAA" * 8)[0] == 1
assert run([GOOD], now="1614266000")[0] == 1
assert run([])[0] == 1
print("verify.py tells good from forged")
