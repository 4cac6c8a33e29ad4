#!/usr/bin/env python3
"""Reads recorded requests of `format = cloudevents` with the `cloudevents` SDK, after `standardwebhooks` has verified them.

    cloudevents_sdk.py --secret whsec_… < requests.jsonl        one {"headers": {…}, "body": "text"} a line

The SDK knows no batches: the list is JSON's, each event in it is read as one of its own. Prints
`N requests, N events, N of them deletions`; exit status 1 with the reason when something is not as the specification has it.
"""

import argparse
import json
import re
import sys

import standardwebhooks.webhooks as library
from cloudevents.core.bindings import http

SINGLE = "application/cloudevents+json; charset=utf-8"
BATCH = "application/cloudevents-batch+json; charset=utf-8"
ATTRIBUTE = re.compile(r"[a-z0-9]{1,20}")


def events_of(headers, body):
    """What the SDK makes of one request."""
    if headers["content-type"] == SINGLE:
        return [http.from_http_event(http.HTTPMessage(headers=headers, body=body))]
    assert headers["content-type"] == BATCH, headers["content-type"]
    single = {**headers, "content-type": SINGLE}
    parts = json.loads(body)
    assert isinstance(parts, list) and parts, "expected a list of events"
    return [http.from_http_event(http.HTTPMessage(headers=single, body=json.dumps(part).encode())) for part in parts]


def check(event):
    """What the SDK does not ask for, and the adapter for CouchDB does."""
    data, attributes = event.get_data(), event.get_attributes()
    assert all(ATTRIBUTE.fullmatch(name) for name in attributes), attributes
    assert event.get_specversion() == "1.0" and event.get_datacontenttype() == "application/json", attributes
    assert re.fullmatch(r"org\.apache\.couchdb\.document\.(updated|deleted)", event.get_type()), attributes
    assert event.get_type().endswith("deleted") == data["deleted"], (attributes, data)
    assert event.get_subject() == data["id"], (attributes, data)
    assert re.fullmatch("msg_[0-9a-f]{32}", event.get_id()), attributes
    assert event.get_time().tzinfo is not None, attributes
    assert event.get_extension("couchdbseq") == str(data["seq"]), (attributes, data)
    assert event.get_source().endswith("/" + data["db"]), attributes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--secret", required=True)
    webhook = library.Webhook(parser.parse_args().secret)
    n_requests = n_deletions = 0
    ids = []
    for line in sys.stdin:
        request = json.loads(line)
        headers, body = request["headers"], request["body"].encode()
        try:
            webhook.verify(body, headers)
        except library.WebhookVerificationError as error:
            sys.exit(f"signature: {error}")
        events = events_of(headers, body)
        for event in events:
            check(event)
            n_deletions += event.get_type().endswith("deleted")
        if headers["content-type"] == SINGLE:
            assert events[0].get_id() == headers["webhook-id"], headers
        else:
            assert headers["webhook-id"] not in [event.get_id() for event in events], headers
        n_requests += 1
        ids += [event.get_id() for event in events]
    assert n_requests, "no request"
    assert len(set(ids)) == len(ids), "an id came twice"
    print(f"{n_requests} requests, {len(ids)} events, {n_deletions} of them deletions")


if __name__ == "__main__":
    main()
