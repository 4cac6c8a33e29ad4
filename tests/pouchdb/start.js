#!/usr/bin/env node
// Starts pouchdb-server, in memory, on a free port of loopback: `node tests/pouchdb/start.js [PORT]`.
// Prints its URL on one line once it answers; ends, and takes its folder along, when stdin ends or a signal comes.
// Everything else it has to say goes to stderr. Install before: npm ci --ignore-scripts --omit=optional

'use strict';
const fs = require('fs');
const http = require('http');
const net = require('net');
const os = require('os');
const path = require('path');

// It dies on an unknown filter otherwise, and with it every database.
process.on('uncaughtException', (error) => console.error('pouchdb-server:', error && error.message));

const dir = fs.mkdtempSync(path.join(os.tmpdir(), 'couch-hookd-pouchdb-'));
process.on('exit', () => fs.rmSync(dir, { recursive: true, force: true }));
for (const signal of ['SIGTERM', 'SIGINT', 'SIGHUP']) process.on(signal, () => process.exit(0));
process.stdin.on('end', () => process.exit(0)).on('error', () => process.exit(0)).resume();

const say = process.stdout.write.bind(process.stdout);
process.stdout.write = process.stderr.write.bind(process.stderr);

function start(port) {
  process.argv = [process.argv[0], 'pouchdb-server', '--in-memory', '--host', '127.0.0.1', '--port', String(port),
    '--config', path.join(dir, 'config.json'), '--dir', dir, '--no-stdout-logs'];
  process.chdir(dir);
  require('pouchdb-server');
  wait(port, Date.now() + 30000);
}

function wait(port, until) {
  const again = () => {
    if (Date.now() > until) {
      console.error('pouchdb-server did not answer within 30 s');
      process.exit(1);
    }
    setTimeout(wait, 50, port, until);
  };
  http.get({ host: '127.0.0.1', port, path: '/' }, (answer) => {
    answer.resume();
    if (answer.statusCode === 200) say(`http://127.0.0.1:${port}\n`);
    else again();
  }).on('error', again);
}

if (process.argv[2]) {
  start(Number(process.argv[2]));
} else {
  const probe = net.createServer().listen(0, '127.0.0.1', () => {
    const { port } = probe.address();
    probe.close(() => start(port));
  });
}
