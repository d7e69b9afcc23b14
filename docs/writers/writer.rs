// A trace writer without dependencies: docs/trace-format.md.
// As a program it writes the tensors of `svdlab trace --check-writer`: rustc writer.rs && ./writer check.safetensors

use std::fs::{rename, File};
use std::io::{BufWriter, Result, Write};

pub struct Tensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub data: Vec<f32>, // row-major
}

fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            c if (c as u32) < 0x20 => out.push_str(&format!("\\u{:04x}", c as u32)),
            c => out.push(c),
        }
    }
    out + "\""
}

/// Write a trace. `settings` is the JSON object of the trace that the port replays; tensors come in execution order.
pub fn write_trace(path: &str, implementation: &str, version: &str, settings: &str, tensors: &[Tensor]) -> Result<()> {
    let order: Vec<String> = tensors.iter().map(|t| quoted(&t.name)).collect();
    let header = format!(
        "{{\"format\":1,\"implementation\":{},\"implementation_version\":{},\"dtype\":\"float32\",\"settings\":{},\"order\":[{}]}}",
        quoted(implementation), quoted(version), settings, order.join(",")
    );
    let mut table = format!("{{\"__metadata__\":{{\"svdlab.trace\":{}}}", quoted(&header));
    let mut end = 0;
    for t in tensors {
        assert_eq!(t.shape.iter().product::<usize>(), t.data.len(), "{}", t.name);
        let start = end;
        end += 4 * t.data.len();
        table += &format!(
            ",{}:{{\"dtype\":\"F32\",\"shape\":{:?},\"data_offsets\":[{},{}]}}",
            quoted(&t.name), t.shape, start, end
        );
    }
    table.push('}');
    while table.len() % 8 != 0 {
        table.push(' '); // the data begins at a multiple of 8
    }
    let part = format!("{}.part", path);
    let mut file = BufWriter::new(File::create(&part)?);
    file.write_all(&(table.len() as u64).to_le_bytes())?;
    file.write_all(table.as_bytes())?;
    for t in tensors {
        for value in &t.data {
            file.write_all(&value.to_le_bytes())?;
        }
    }
    file.into_inner()?.sync_all()?;
    rename(part, path)
}

fn main() -> Result<()> {
    let path = std::env::args().nth(1).expect("usage: writer FILE");
    let settings = "{\"height\":16,\"width\":24,\"num_frames\":7,\"num_inference_steps\":4,\"num_videos_per_prompt\":5}";
    let shapes: [(&str, &[usize]); 8] = [
        ("image_embeddings", &[5, 1, 6]),
        ("image_latents", &[5, 4, 2, 3]),
        ("added_time_ids", &[5, 3]),
        ("sigmas", &[5]),
        ("guidance_scale", &[5, 7]),
        ("model_input.000", &[10, 7, 8, 2, 3]),
        ("latents.000", &[5, 7, 4, 2, 3]),
        ("frames", &[5, 7, 3, 16, 24]),
    ];
    let mut tensors = Vec::new();
    for (k, (name, shape)) in shapes.iter().enumerate() {
        let size = shape.iter().product::<usize>();
        let data = (0..size).map(|i| i as f32 + k as f32 / 16.0).collect();
        tensors.push(Tensor { name: name.to_string(), shape: shape.to_vec(), data });
    }
    write_trace(&path, "writer.rs", "1", settings, &tensors)
}
