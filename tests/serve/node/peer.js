// A sender and a receiver of CloudEvents, written as users of the package `cloudevents` write them.
//
//   node peer.js send URL   stdin: one JSON array of {mode, event, octets?, headers?}; stdout: one JSON line per answer
//   node peer.js receive    stdout: the port, then one JSON line per request, as HTTP.toEvent() reads it
//
// `octets` is base64 for data that are bytes. What the receiver prints of bytes is {"octets": base64}.
// A receiver answers 204; to an event with the extension `wanted` it replies with an event of that mode.

"use strict";

const http = require("http");
const { CloudEvent, HTTP, Mode, emitterFor, httpTransport } = require("cloudevents");

async function send(url) {
  const transport = httpTransport(url);
  const emitters = {
    binary: emitterFor(transport, { mode: Mode.BINARY }),
    structured: emitterFor(transport, { mode: Mode.STRUCTURED }),
  };
  for (const one of JSON.parse(await text(process.stdin))) {
    try {
      let answer;
      if (one.mode === "batch") {
        // The emitter has no batches; its transport carries what the format writes.
        const events = one.events.map((event) => new CloudEvent(event));
        const headers = { "content-type": "application/cloudevents-batch+json" };
        answer = await transport({ headers, body: JSON.stringify(events) });
      } else {
        const data = one.octets === undefined ? {} : { data: Buffer.from(one.octets, "base64") };
        answer = await emitters[one.mode](new CloudEvent({ ...one.event, ...data }), { headers: one.headers });
      }
      // The emitter does not tell the status: the broker's 202 has no body, its refusals have one that does.
      print(answer.body === "" ? { status: 202 } : JSON.parse(answer.body));
    } catch (error) {
      print({ error: `${error.name}: ${error.message}` });
    }
  }
  process.exit(); // requests that its transport began and could not write are still open
}

function receive() {
  const server = http.createServer(async (request, response) => {
    const body = await text(request);
    let reply = { headers: {}, body: "" };
    try {
      const event = HTTP.toEvent({ headers: request.headers, body });
      print({ event: shown(event) });
      if (event.wanted !== undefined) {
        const { wanted, ...rest } = event;
        reply = HTTP[wanted](new CloudEvent({ ...rest, id: `${event.id}-reply`, type: "reply" }));
      }
    } catch (error) {
      print({ error: `${error.name}: ${error.message}` });
    }
    response.writeHead(reply.body ? 200 : 204, reply.headers);
    response.end(reply.body);
  });
  server.listen(0, "127.0.0.1", () => print(server.address().port));
}

function shown(event) {
  const members = { ...event };
  delete members.data_base64;
  if (ArrayBuffer.isView(members.data)) {
    members.data = { octets: Buffer.from(members.data).toString("base64") };
  }
  return members;
}

async function text(stream) {
  const chunks = [];
  for await (const chunk of stream) {
    chunks.push(chunk);
  }
  return Buffer.concat(chunks).toString("utf8");
}

function print(value) {
  process.stdout.write(`${JSON.stringify(value)}\n`);
}

if (process.argv[2] === "send") {
  send(process.argv[3]);
} else {
  receive();
}
