// A trace writer without dependencies, C++17: docs/trace-format.md.
// As a program it writes the tensors of `svdlab trace --check-writer`:
// g++ -std=c++17 writer.cpp -o writer && ./writer check.safetensors

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

struct Tensor {
    std::string name;
    std::vector<std::size_t> shape;
    std::vector<float> data;  // row-major
};

static std::string json_string(const std::string& text) {
    std::string out = "\"";
    for (unsigned char c : text) {
        if (c == '"' || c == '\\') {
            out += '\\';
            out += static_cast<char>(c);
        } else if (c < 0x20) {
            char code[8];
            std::snprintf(code, sizeof code, "\\u%04x", c);
            out += code;
        } else {
            out += static_cast<char>(c);
        }
    }
    return out + '"';
}

// The lowest `bytes` bytes of a value, the lowest first, whatever the machine's own order.
static void put(std::ofstream& file, std::uint64_t value, int bytes) {
    for (int i = 0; i < bytes; ++i) file.put(static_cast<char>(value >> (8 * i) & 0xff));
}

// Write a trace. `settings` is the JSON object of the trace that the port replays; tensors come in execution order.
void write_trace(const std::string& path, const std::string& implementation, const std::string& version,
                 const std::string& settings, const std::vector<Tensor>& tensors) {
    std::string order, entries;
    std::size_t end = 0;
    for (const Tensor& t : tensors) {
        std::string shape;
        std::size_t size = 1;
        for (std::size_t n : t.shape) {
            shape += (shape.empty() ? "" : ",") + std::to_string(n);
            size *= n;
        }
        if (size != t.data.size()) throw std::invalid_argument(t.name + ": its shape and its data differ");
        std::size_t start = end;
        end += 4 * size;
        order += (order.empty() ? "" : ",") + json_string(t.name);
        entries += "," + json_string(t.name) + ":{\"dtype\":\"F32\",\"shape\":[" + shape + "],\"data_offsets\":[" +
                   std::to_string(start) + "," + std::to_string(end) + "]}";
    }
    std::string header = "{\"format\":1,\"implementation\":" + json_string(implementation) + ",\"implementation_version\":" +
                         json_string(version) + ",\"dtype\":\"float32\",\"settings\":" + settings + ",\"order\":[" + order + "]}";
    std::string table = "{\"__metadata__\":{\"svdlab.trace\":" + json_string(header) + "}" + entries + "}";
    table.append((8 - table.size() % 8) % 8, ' ');  // the data begins at a multiple of 8
    {
        std::ofstream file(path + ".part", std::ios::binary);
        file.exceptions(std::ios::failbit | std::ios::badbit);
        put(file, table.size(), 8);
        file << table;
        for (const Tensor& t : tensors) {
            for (float value : t.data) {
                std::uint32_t bits;
                std::memcpy(&bits, &value, 4);
                put(file, bits, 4);
            }
        }
        file.close();
    }
    std::filesystem::rename(path + ".part", path);
}

int main(int argc, char** argv) {
    if (argc != 2) {
        std::fprintf(stderr, "usage: writer FILE\n");
        return 2;
    }
    std::vector<Tensor> tensors = {
        {"image_embeddings", {5, 1, 6}, {}},
        {"image_latents", {5, 4, 2, 3}, {}},
        {"added_time_ids", {5, 3}, {}},
        {"sigmas", {5}, {}},
        {"guidance_scale", {5, 7}, {}},
        {"model_input.000", {10, 7, 8, 2, 3}, {}},
        {"latents.000", {5, 7, 4, 2, 3}, {}},
        {"frames", {5, 7, 3, 16, 24}, {}},
    };
    for (std::size_t k = 0; k < tensors.size(); ++k) {
        std::size_t size = 1;
        for (std::size_t n : tensors[k].shape) size *= n;
        for (std::size_t i = 0; i < size; ++i) tensors[k].data.push_back(static_cast<float>(i) + k / 16.0f);
    }
    const char* settings =
        "{\"height\":16,\"width\":24,\"num_frames\":7,\"num_inference_steps\":4,\"num_videos_per_prompt\":5}";
    write_trace(argv[1], "writer.cpp", "1", settings, tensors);
}
