// A trace writer without dependencies, for Node: docs/trace-format.md.
// As a program it writes the tensors of `svdlab trace --check-writer`: node writer.mjs check.safetensors

import { closeSync, openSync, renameSync, writeSync } from "node:fs";
import { pathToFileURL } from "node:url";

/**
 * Write a trace. `settings` is the object of the trace that the port replays; `tensors` are {name, shape, data} in
 * execution order, data a row-major Float32Array.
 */
export function writeTrace(path, implementation, version, settings, tensors) {
  const header = {
    format: 1,
    implementation,
    implementation_version: version,
    dtype: "float32",
    settings,
    order: tensors.map((t) => t.name),
  };
  const table = { __metadata__: { "svdlab.trace": JSON.stringify(header) } };
  let end = 0;
  for (const { name, shape, data } of tensors) {
    if (shape.reduce((a, b) => a * b, 1) !== data.length) throw new Error(`${name}: its shape and its data differ`);
    table[name] = { dtype: "F32", shape, data_offsets: [end, (end += 4 * data.length)] };
  }
  let head = Buffer.from(JSON.stringify(table), "utf8");
  head = Buffer.concat([head, Buffer.alloc((8 - (head.length % 8)) % 8, " ")]); // the data begins at a multiple of 8
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(head.length));
  const file = openSync(`${path}.part`, "w");
  const write = (buffer) => {
    for (let at = 0; at < buffer.length; ) at += writeSync(file, buffer, at);
  };
  write(length);
  write(head);
  for (const { data } of tensors) {
    const bytes = Buffer.alloc(4 * data.length);
    data.forEach((value, i) => bytes.writeFloatLE(value, 4 * i));
    write(bytes);
  }
  closeSync(file);
  renameSync(`${path}.part`, path);
}

function main(path) {
  const settings = { height: 16, width: 24, num_frames: 7, num_inference_steps: 4, num_videos_per_prompt: 5 };
  const shapes = {
    image_embeddings: [5, 1, 6],
    image_latents: [5, 4, 2, 3],
    added_time_ids: [5, 3],
    sigmas: [5],
    guidance_scale: [5, 7],
    "model_input.000": [10, 7, 8, 2, 3],
    "latents.000": [5, 7, 4, 2, 3],
    frames: [5, 7, 3, 16, 24],
  };
  const tensors = Object.entries(shapes).map(([name, shape], k) => {
    const size = shape.reduce((a, b) => a * b, 1);
    return { name, shape, data: Float32Array.from({ length: size }, (_, i) => i + k / 16) };
  });
  writeTrace(path, "writer.mjs", "1", settings, tensors);
}

if (import.meta.url === pathToFileURL(process.argv[1]).href) {
  if (process.argv.length !== 3) throw new Error("usage: node writer.mjs FILE");
  main(process.argv[2]);
}
