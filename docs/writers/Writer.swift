// A trace writer without dependencies but Foundation: docs/trace-format.md.
// UNTRIED: no test compiles this file. Its output can be judged with `svdlab trace --check-writer check.safetensors`.
// As a program it writes the tensors of that test: swiftc Writer.swift -o writer && ./writer check.safetensors

import Foundation

struct Tensor {
    let name: String
    let shape: [Int]
    let data: [Float]  // row-major
}

enum WriterError: Error {
    case shape(String)
}

func json(_ value: Any) throws -> Data {
    try JSONSerialization.data(withJSONObject: value, options: [.sortedKeys])
}

/// Write a trace. `settings` is the object of the trace that the port replays; tensors come in execution order.
func writeTrace(
    path: String, implementation: String, version: String, settings: [String: Any], tensors: [Tensor]
) throws {
    let header: [String: Any] = [
        "format": 1,
        "implementation": implementation,
        "implementation_version": version,
        "dtype": "float32",
        "settings": settings,
        "order": tensors.map { $0.name },
    ]
    var table: [String: Any] = ["__metadata__": ["svdlab.trace": String(decoding: try json(header), as: UTF8.self)]]
    var body = Data()
    for tensor in tensors {
        guard tensor.shape.reduce(1, *) == tensor.data.count else { throw WriterError.shape(tensor.name) }
        let start = body.count
        for value in tensor.data {
            withUnsafeBytes(of: value.bitPattern.littleEndian) { body.append(contentsOf: $0) }
        }
        table[tensor.name] = ["dtype": "F32", "shape": tensor.shape, "data_offsets": [start, body.count]]
    }
    var head = try json(table)
    head.append(Data(repeating: 0x20, count: (8 - head.count % 8) % 8))  // the data begins at a multiple of 8
    var file = Data()
    withUnsafeBytes(of: UInt64(head.count).littleEndian) { file.append(contentsOf: $0) }
    file.append(head)
    file.append(body)
    try file.write(to: URL(fileURLWithPath: path), options: .atomic)
}

let settings: [String: Any] = [
    "height": 16, "width": 24, "num_frames": 7, "num_inference_steps": 4, "num_videos_per_prompt": 5,
]
let shapes: [(String, [Int])] = [
    ("image_embeddings", [5, 1, 6]),
    ("image_latents", [5, 4, 2, 3]),
    ("added_time_ids", [5, 3]),
    ("sigmas", [5]),
    ("guidance_scale", [5, 7]),
    ("model_input.000", [10, 7, 8, 2, 3]),
    ("latents.000", [5, 7, 4, 2, 3]),
    ("frames", [5, 7, 3, 16, 24]),
]
let tensors = shapes.enumerated().map { k, entry in
    Tensor(
        name: entry.0, shape: entry.1,
        data: (0..<entry.1.reduce(1, *)).map { Float($0) + Float(k) / 16 })
}
guard CommandLine.arguments.count == 2 else {
    print("usage: writer FILE")
    exit(2)
}
try writeTrace(
    path: CommandLine.arguments[1], implementation: "Writer.swift", version: "1", settings: settings, tensors: tensors)
