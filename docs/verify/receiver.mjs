import { createHmac, timingSafeEqual } from "node:crypto";
import { createServer } from "node:http";

// Several secrets, separated by blanks, while one replaces another.
const keys = process.env.WEBHOOK_SECRET.split(" ").map((s) => Buffer.from(s.replace(/^whsec_/, ""), "base64"));

function isGenuine(headers, body) {
  const at = headers["webhook-timestamp"] ?? "";
  if (!/^\d+$/.test(at) || Math.abs(Date.now() / 1000 - at) > 300) return false;
  const signed = Buffer.concat([Buffer.from(`${headers["webhook-id"]}.${at}.`), body]); // the body as it came
  const wanted = keys.map((key) => Buffer.from("v1," + createHmac("sha256", key).update(signed).digest("base64")));
  const given = (headers["webhook-signature"] ?? "").split(" ").map((text) => Buffer.from(text));
  return wanted.some((one) => given.some((other) => one.length === other.length && timingSafeEqual(one, other)));
}

createServer(async (request, response) => {
  const chunks = [];
  for await (const chunk of request) chunks.push(chunk);
  const body = Buffer.concat(chunks);
  const genuine = isGenuine(request.headers, body);
  if (genuine) {
    const event = JSON.parse(body);
    console.log(event.id, event.type, event.data.id); // known id: seen before, do nothing
  }
  response.writeHead(genuine ? 204 : 401).end();
}).listen(Number(process.env.PORT ?? 8787), "127.0.0.1");
