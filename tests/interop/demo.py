#!/usr/bin/env python3
"""Runs `couch-hookd demo` and believes nothing of it: signatures, revisions and numbers are computed again here.

    demo.py PROGRAM [ARGUMENT…]        such as `demo.py cargo run --release --locked --quiet --`

With --json: every signature is verified by the `standardwebhooks` package, every body held against
docs/event.schema.json, every member of it looked for there, and the last revision received of each document compared
with what the stand-in for CouchDB holds. Then the same checks must fail on what is made wrong on purpose. Last the
plain demo: exit status 0 and the form of its closing line.
"""

import collections
import json
import pathlib
import re
import subprocess
import sys

import jsonschema
import standardwebhooks.webhooks as library

SCHEMA = json.loads((pathlib.Path(__file__).parents[2] / "docs/event.schema.json").read_text())
CLOSING = re.compile(
    r"^(\d+) written, (\d+) delivered, (\d+) repeated after 1 kill, "
    r"(?:(\d+) replaced by newer revisions before they were read, )?0 lost$"
)


def run(program, *arguments):
    done = subprocess.run([*program, "demo", *arguments], stdout=subprocess.PIPE, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"expected exit status 0, got {done.returncode}:\n{done.stdout[-2000:]}"
    return done.stdout.splitlines()


def unknown_members(value, schema, place=""):
    """Members that the schema allows but does not tell of: the reference would be incomplete."""
    members = schema.get("properties")
    if not isinstance(value, dict) or members is None:
        return []
    found = [f"{place}.{name}" for name in value if name not in members]
    for name in value.keys() & members.keys():
        found += unknown_members(value[name], members[name], f"{place}.{name}")
    return found


def check(lines):
    """Raises when anything that `demo --json` printed does not hold; gives the number of requests."""
    first, *requests, last = [json.loads(line) for line in lines]
    webhook = library.Webhook(first["secret"])
    taken, ids = {}, collections.defaultdict(set)
    for request in requests:
        body = webhook.verify(request["body"].encode(), request["headers"])
        jsonschema.validate(body, SCHEMA)
        assert not unknown_members(body, SCHEMA), unknown_members(body, SCHEMA)
        data = body["data"]
        assert body["id"] == request["headers"]["webhook-id"] == request["webhook_id"], request
        assert data["doc"]["_rev"] == data["rev"] and data["doc"]["_id"] == data["id"], request
        assert int(data["rev"].split("-")[0]) == data["generation"], request
        taken[data["id"]] = data["rev"]
        ids[data["id"], data["rev"]].add(body["id"])
    assert all(len(same) == 1 for same in ids.values()), "one revision was told under two ids"
    distinct = set().union(*ids.values())
    assert len(distinct) == len(ids), "two revisions were told under one id"
    holds = last["couchdb_holds"]
    wrong = {key: (taken.get(key), holds.get(key)) for key in taken.keys() | holds.keys() if taken.get(key) != holds.get(key)}
    assert not wrong, f"last revision received, revision that CouchDB holds: {wrong}"
    counted = {"delivered": len(ids), "repeated": len(requests) - len(distinct), "kills": 1, "lost": 0, "unverified": 0}
    assert {name: last[name] for name in counted} == counted, (last, counted)
    assert last["written"] == len(ids) + last["replaced"] and not last["violations"], last
    return len(requests)


def must_fail(what, lines):
    try:
        check(lines)
    except (AssertionError, library.WebhookVerificationError, jsonschema.ValidationError):
        return
    raise AssertionError(f"the checks did not notice {what}")


def main():
    program = sys.argv[1:]
    lines = run(program, "--json", "--for", "6s")
    n_requests = check(lines)
    final = max(range(1, len(lines) - 1), key=lambda number: json.loads(lines[number])["doc_id"])
    doc_id = json.loads(lines[final])["doc_id"]
    must_fail("a changed body", lines[:1] + [lines[1].replace("total", "Total")] + lines[2:])
    must_fail("a lost document", [line for line in lines if not f'"doc_id":"{doc_id}"' in line])
    must_fail("a lost request", lines[: len(lines) // 2] + lines[len(lines) // 2 + 1 :])
    must_fail("another secret", ['{"secret":"whsec_' + "A" * 32 + '"}'] + lines[1:])
    print(f"{n_requests} requests of demo --json verified")
    lines = run(program, "--for", "15s")
    closing = CLOSING.match(lines[-1])
    assert closing, f"expected `N written, N delivered, N repeated after 1 kill, 0 lost`, got `{lines[-1]}`"
    written, delivered, _repeated, replaced = (int(number or 0) for number in closing.groups())
    assert written == delivered + replaced and written > 100, lines[-1]
    assert any("kill -9" in line for line in lines) and any("signature verified" in line for line in lines)
    print(lines[-1])


if __name__ == "__main__":
    main()
