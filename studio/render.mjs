// Draws pictures: one JSON job a line on standard input, raw RGBA pixels on standard output, in the same order.
// A job is {"avataaars": {options}} or {"svg": "<svg ...>"}; each comes out square, `size` pixels wide (first argument).
import { once } from "node:events";
import { createInterface } from "node:readline";
import * as avataaars from "@dicebear/avataaars";
import { createAvatar } from "@dicebear/core";
import { Resvg } from "@resvg/resvg-js";

const size = Number(process.argv[2]);
for await (const line of createInterface({ input: process.stdin })) {
  const job = JSON.parse(line);
  const svg = job.svg ?? createAvatar(avataaars, job.avataaars).toString();
  const picture = new Resvg(svg, { fitTo: { mode: "width", value: size }, font: { loadSystemFonts: false } }).render();
  if (!process.stdout.write(picture.pixels)) await once(process.stdout, "drain");
}
