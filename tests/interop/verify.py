#!/usr/bin/env python3
"""Verifies recorded webhook requests with the `standardwebhooks` package, not with our own code.

    verify.py --secret whsec_… [--secret whsec_…] [--now SECONDS] < requests.jsonl

One JSON object a line: {"headers": {"webhook-id": …}, "body": "text"}, or "body_base64" for bytes as they came. A line
may bring its own "secret" or "secrets". Each secret given must verify every request that does not bring its own:
every secret signs. --now is for old recordings: the package refuses timestamps over five minutes off.
Prints `N verified, N failed`; exit status 1 when one fails, or when there was none at all.
"""

import argparse
import base64
import datetime
import json
import sys

import standardwebhooks.webhooks as library


def at(seconds):
    """Makes the package's clock stand still."""

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime.fromtimestamp(seconds, tz)

    library.datetime = Clock


def check(request, secrets):
    """Raises when the signature, the timestamp or the body is not what the specification asks for."""
    body = base64.b64decode(request["body_base64"]) if "body_base64" in request else request["body"].encode()
    for secret in secrets:
        payload = library.Webhook(secret).verify(body, request["headers"])
        if isinstance(payload, dict) and payload.get("id", request["headers"]["webhook-id"]) != request["headers"]["webhook-id"]:
            raise library.WebhookVerificationError("the body's id is another than the header's")
    if not secrets:
        raise library.WebhookVerificationError("no secret given")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--secret", action="append", default=[])
    parser.add_argument("--now", type=float)
    arguments = parser.parse_args()
    if arguments.now is not None:
        at(arguments.now)
    verified = failed = 0
    for number, line in enumerate(sys.stdin.buffer, 1):
        if not line.strip():
            continue
        try:
            request = json.loads(line)
            request["headers"] = {name.lower(): value for name, value in request["headers"].items()}
            own = request.get("secrets") or ([request["secret"]] if "secret" in request else arguments.secret)
            check(request, own)
            verified += 1
        except Exception as error:  # a request that breaks the package is a request that fails
            failed += 1
            if failed <= 10:
                print(f"line {number}: {type(error).__name__}: {error}", file=sys.stderr)
    print(f"{verified} verified, {failed} failed")
    return 1 if failed or not verified else 0


if __name__ == "__main__":
    sys.exit(main())
