// Fuzzes how the patched llama.cpp loads a GGUF: every input is a file, loaded whole and freed. scripts/fuzz-loader builds it.
//
// Besides libFuzzer's own mutations there are some that know the format, because most others end at the header: a number of
// the metadata, a dimension, a type, an entry of a tier map or the name of a tensor gets another value, and the offsets of all
// tensors are then made right again.

#include "gguf.h"
#include "llama.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <stdexcept>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

extern "C" size_t LLVMFuzzerMutate(uint8_t * data, size_t size, size_t max_size);

namespace {

struct tensor {
    size_t name, name_len, dims, n_dims, type, offset; // positions in the file, but for the two lengths
};

struct layout {
    std::vector<size_t> numbers; // positions of 4-byte numbers of the metadata
    std::vector<tensor> tensors;
    size_t data = 0;
};

template <typename T> T get(const std::vector<uint8_t> & file, size_t at) {
    T value;
    memcpy(&value, file.data() + at, sizeof(value));
    return value;
}

template <typename T> void set(std::vector<uint8_t> & file, size_t at, T value) {
    memcpy(file.data() + at, &value, sizeof(value));
}

// Finds the parts of a file that is sound so far; false for any other.
bool parse(const std::vector<uint8_t> & file, layout & out) {
    static const size_t sizes[] = { 1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8 };
    size_t at = 24;
    const auto has = [&](uint64_t n) { return n <= file.size() && at + n <= file.size(); };
    const auto skip_string = [&]() {
        if (!has(8)) { return false; }
        const uint64_t n = get<uint64_t>(file, at);
        at += 8;
        if (!has(n)) { return false; }
        at += n;
        return true;
    };
    if (file.size() < 24 || memcmp(file.data(), "GGUF", 4) != 0) { return false; }
    const uint64_t n_tensors = get<uint64_t>(file, 8);
    const uint64_t n_kv = get<uint64_t>(file, 16);
    if (n_tensors > 1000 || n_kv > 1000) { return false; }
    for (uint64_t i = 0; i < n_kv; ++i) {
        if (!skip_string() || !has(4)) { return false; }
        uint32_t type = get<uint32_t>(file, at);
        uint64_t n = 1;
        at += 4;
        if (type == 9) {
            if (!has(12)) { return false; }
            type = get<uint32_t>(file, at);
            n = get<uint64_t>(file, at + 4);
            at += 12;
        }
        if (type > 12 || type == 9 || n > file.size()) { return false; }
        for (uint64_t j = 0; j < n; ++j) {
            if (type == 8) {
                if (!skip_string()) { return false; }
                continue;
            }
            if (!has(sizes[type])) { return false; }
            if (sizes[type] == 4) { out.numbers.push_back(at); }
            at += sizes[type];
        }
    }
    for (uint64_t i = 0; i < n_tensors; ++i) {
        tensor t;
        t.name = at + 8;
        if (!skip_string() || !has(4)) { return false; }
        t.name_len = at - t.name;
        t.n_dims = get<uint32_t>(file, at);
        t.dims = at + 4;
        if (t.n_dims > 4) { return false; }
        at += 4;
        if (!has(8*t.n_dims + 12)) { return false; }
        t.type = at + 8*t.n_dims;
        t.offset = t.type + 4;
        at = t.offset + 8;
        out.tensors.push_back(t);
    }
    out.data = (at + 31)/32*32;
    return true;
}

size_t tensor_bytes(const std::vector<uint8_t> & file, const tensor & t) {
    uint64_t n = get<uint32_t>(file, t.type) == 0 || get<uint32_t>(file, t.type) == 26 ? 4 : 2; // F32, I32; else as F16
    for (size_t d = 0; d < t.n_dims; ++d) { n *= get<uint64_t>(file, t.dims + 8*d) & 0xffff; }
    return n;
}

// Puts the tensors one behind the other again, with the size that their shapes give, and pads the file to that.
void settle(std::vector<uint8_t> & file, const layout & parts, size_t max_size) {
    uint64_t offset = 0;
    for (const auto & t : parts.tensors) {
        set<uint64_t>(file, t.offset, offset);
        offset += (tensor_bytes(file, t) + 31)/32*32;
    }
    if (parts.data + offset <= max_size) { file.resize(parts.data + offset); }
}

uint32_t other(uint32_t value, unsigned seed) {
    static const uint32_t odd[] = { 0, 1, 2, 3, 7, 31, 33, 64, 0x7fffffff, 0x80000000, 0xffffffff, 0xfffffffe, 1 << 16 };
    switch (seed % 4) {
        case 0: return value + 1;
        case 1: return value - 1;
        default: return odd[(seed/4) % (sizeof(odd)/sizeof(odd[0]))];
    }
}

void mutate(std::vector<uint8_t> & file, const layout & parts) {
    const auto pick = [](size_t n) { return size_t(rand()) % n; };
    const tensor & t = parts.tensors[pick(parts.tensors.size())];
    switch (pick(6)) {
        case 0:
            if (!parts.numbers.empty()) {
                const size_t at = parts.numbers[pick(parts.numbers.size())];
                set<uint32_t>(file, at, other(get<uint32_t>(file, at), rand()));
            }
            break;
        case 1:
            if (t.n_dims > 0) {
                const size_t at = t.dims + 8*pick(t.n_dims);
                set<uint64_t>(file, at, other(get<uint64_t>(file, at), rand()));
            }
            break;
        case 2:
            set<uint32_t>(file, t.type, pick(42));
            break;
        case 3: { // a digit of a name: another layer or tier
            const size_t at = t.name + pick(t.name_len + 1);
            if (at < t.name + t.name_len && file[at] >= '0' && file[at] <= '9') { file[at] = '0' + pick(10); }
            break;
        }
        default: // a tier map
            for (size_t i = 0, start = pick(parts.tensors.size()); i < parts.tensors.size(); ++i) {
                const tensor & m = parts.tensors[(start + i) % parts.tensors.size()];
                const std::string name(file.begin() + m.name, file.begin() + m.name + m.name_len);
                const size_t begin = parts.data + get<uint64_t>(file, m.offset);
                const size_t n = tensor_bytes(file, m)/4;
                if (name.find("ffn_exps_tier") == std::string::npos || n == 0 || begin + 4*n > file.size()) { continue; }
                const size_t at = begin + 4*pick(n);
                set<uint32_t>(file, at, other(get<uint32_t>(file, at), rand()));
                break;
            }
    }
}

// llama.cpp answers some broken files with a failed assertion, the same with our patches as without. Here that becomes an
// exception, which its loader reports as any other, so that the run gets past them; each place is said once. An assertion in
// the code of the patches stays a crash.
void refuse(const char * message) {
    static std::set<std::string> seen;
    const std::string text(message);
    if (text.find("llama-moe-tiers") != std::string::npos) { return; }
    if (seen.insert(text).second) { fprintf(stderr, "upstream assertion: %s\n", message); }
    throw std::runtime_error(text);
}

// A file without a vocabulary says how many tokens there are, and llama.cpp makes room for as many as it says, with our
// patches or without: known, and not looked for again.
bool has_huge_vocabulary(const char * path) {
    gguf_context * file = gguf_init_from_file(path, { /*.no_alloc =*/ true, /*.ctx =*/ nullptr });
    bool found = false;
    for (int64_t i = 0; file != nullptr && i < gguf_get_n_kv(file); ++i) {
        const std::string key = gguf_get_key(file, i);
        found = found || (key.find(".vocab_size") != std::string::npos &&
            gguf_get_kv_type(file, i) == GGUF_TYPE_UINT32 && gguf_get_val_u32(file, i) > 1 << 20);
    }
    gguf_free(file);
    return found;
}

int make_file() {
    const int fd = memfd_create("model", 0);
    if (fd < 0) { abort(); }
    return fd;
}

} // namespace

extern "C" int LLVMFuzzerInitialize(int *, char ***) {
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    ggml_set_abort_callback(refuse);
    llama_backend_init();
    return 0;
}

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t * data, size_t size, size_t max_size, unsigned int seed) {
    std::vector<uint8_t> file(data, data + size);
    layout parts;
    srand(seed);
    if (seed % 4 == 0 || !parse(file, parts) || parts.tensors.empty()) {
        return LLVMFuzzerMutate(data, size, max_size);
    }
    for (int i = rand() % 3; i >= 0; --i) { mutate(file, parts); }
    settle(file, parts, max_size);
    memcpy(data, file.data(), file.size());
    return file.size();
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    static const int fd = make_file();
    static const std::string path = "/proc/self/fd/" + std::to_string(fd);
    if (ftruncate(fd, 0) != 0 || pwrite(fd, data, size, 0) != (ssize_t) size) { abort(); }
    if (has_huge_vocabulary(path.c_str())) { return 0; }

    llama_model_params params = llama_model_default_params();
    params.n_gpu_layers = 0;
    params.load_mode = size % 64 < 32 ? LLAMA_LOAD_MODE_MMAP : LLAMA_LOAD_MODE_NONE;
    params.check_tensors = size % 3 == 0;
    llama_model * model = llama_model_load_from_file(path.c_str(), params);
    if (model != nullptr) { llama_model_free(model); }
    return 0;
}
