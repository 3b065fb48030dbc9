// Reads safetensors files: a JSON header of names, types, shapes and places, then the numbers. Nothing in them is code.
#pragma once

#include <ATen/ATen.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace safetensors {

using Tensors = std::map<std::string, at::Tensor>;

// A file in memory: a private mapping, so that pages are read when they are used and the file is never written.
class Mapping {
 public:
  explicit Mapping(const std::string& path) {
    const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file < 0) {
      throw std::runtime_error(path + ": " + std::strerror(errno));
    }
    struct stat status {};
    if (::fstat(file, &status) == 0 && status.st_size > 0) {
      size_ = static_cast<size_t>(status.st_size);
      data_ = ::mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
    }
    ::close(file);
    if (data_ == MAP_FAILED) {
      throw std::runtime_error(path + ": cannot be read");
    }
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() {
    ::munmap(data_, size_);
  }

  char* data() const {
    return static_cast<char*>(data_);
  }
  size_t size() const {
    return size_;
  }

 private:
  void* data_ = MAP_FAILED;
  size_t size_ = 0;
};

// The JSON that a header may be made of: objects of strings, numbers without a sign, and lists of these.
class Header {
 public:
  explicit Header(std::string_view text) : rest_(text) {}

  bool accept(char wanted) {
    while (!rest_.empty() && std::strchr(" \t\r\n", rest_.front())) {
      rest_.remove_prefix(1);
    }
    if (rest_.empty() || rest_.front() != wanted) {
      return false;
    }
    rest_.remove_prefix(1);
    return true;
  }

  void expect(char wanted) {
    if (!accept(wanted)) {
      throw std::runtime_error(std::string("its header lacks a '") + wanted + "'");
    }
  }

  bool at_end() {
    return !accept('\0') && rest_.find_first_not_of(" \t\r\n") == std::string_view::npos;
  }

  // Calls member(key) at the value of each.
  template <class Member>
  void object(const Member& member) {
    expect('{');
    if (accept('}')) {
      return;
    }
    do {
      const std::string key = string();
      expect(':');
      member(key);
    } while (accept(','));
    expect('}');
  }

  std::string string() {
    expect('"');
    std::string text;
    for (;;) {
      const char c = next();
      if (c == '"') {
        return text;
      }
      text += c == '\\' ? escaped() : c;
    }
  }

  std::vector<int64_t> numbers() {
    std::vector<int64_t> found;
    expect('[');
    if (accept(']')) {
      return found;
    }
    do {
      found.push_back(number());
    } while (accept(','));
    expect(']');
    return found;
  }

 private:
  char next() {
    if (rest_.empty()) {
      throw std::runtime_error("its header ends too early");
    }
    const char c = rest_.front();
    rest_.remove_prefix(1);
    return c;
  }

  char escaped() {
    static constexpr std::string_view letters = "\"\\/bfnrt", meant = "\"\\/\b\f\n\r\t";
    const char c = next();
    if (const auto i = letters.find(c); i != std::string_view::npos) {
      return meant[i];
    }
    // What writers escape by number are control characters; all others are in the header as they are.
    unsigned code = 0;
    for (int i = 0; c == 'u' && i < 4; ++i) {
      const auto digit = std::string_view("0123456789abcdef").find(static_cast<char>(next() | 0x20));
      code = digit == std::string_view::npos ? 0x80 : code * 16 + static_cast<unsigned>(digit);
    }
    if (c != 'u' || code >= 0x80) {
      throw std::runtime_error("its header has an escape that is not understood");
    }
    return static_cast<char>(code);
  }

  int64_t number() {
    accept('\0');  // skips white space
    int64_t value = 0, digits = 0;
    for (; !rest_.empty() && rest_.front() >= '0' && rest_.front() <= '9'; ++digits) {
      if (digits == 18) {
        throw std::runtime_error("its header has a number that is too large");
      }
      value = value * 10 + (next() - '0');
    }
    if (digits == 0) {
      throw std::runtime_error("its header lacks a number");
    }
    return value;
  }

  std::string_view rest_;
};

inline at::ScalarType scalar_type(const std::string& name) {
  static const std::map<std::string, at::ScalarType> types = {
      {"F64", at::kDouble}, {"F32", at::kFloat}, {"F16", at::kHalf}, {"BF16", at::kBFloat16}, {"I64", at::kLong}};
  const auto found = types.find(name);
  if (found == types.end()) {
    throw std::runtime_error("type " + name + " is not read here");
  }
  return found->second;
}

// A tensor on the pages of the file, which it keeps mapped.
inline at::Tensor tensor_of(Header& header, const std::shared_ptr<Mapping>& file, size_t start) {
  std::string type;
  std::vector<int64_t> shape, place;
  header.object([&](const std::string& key) {
    if (key == "dtype") {
      type = header.string();
    } else if (key == "shape") {
      shape = header.numbers();
    } else if (key == "data_offsets") {
      place = header.numbers();
    } else {
      throw std::runtime_error("its header says '" + key + "' of a tensor");
    }
  });
  const auto dtype = scalar_type(type);
  const auto width = static_cast<int64_t>(at::elementSize(dtype)), room = static_cast<int64_t>(file->size() - start);
  if (place.size() != 2 || place[0] > place[1] || place[1] > room) {
    throw std::runtime_error("a tensor lies outside of the file");
  }
  int64_t bytes = width;
  for (const int64_t size : shape) {
    if (__builtin_mul_overflow(bytes, size, &bytes)) {
      throw std::runtime_error("a tensor is too large");
    }
  }
  char* data = file->data() + start + place[0];
  if (bytes != place[1] - place[0] || reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(width) != 0) {
    throw std::runtime_error("a tensor's place does not fit its shape");
  }
  return at::from_blob(data, shape, [file](void*) {}, at::TensorOptions(dtype));
}

// All tensors of a file, by name. Throws std::runtime_error, with the path, if it is damaged.
inline Tensors load(const std::string& path) {
  const auto file = std::make_shared<Mapping>(path);
  try {
    uint64_t length = 0;
    if (file->size() < sizeof(length)) {
      throw std::runtime_error("it is too short");
    }
    std::memcpy(&length, file->data(), sizeof(length));
    if (length > file->size() - sizeof(length)) {
      throw std::runtime_error("its header is longer than the file");
    }
    Tensors tensors;
    Header header({file->data() + sizeof(length), static_cast<size_t>(length)});
    header.object([&](const std::string& name) {
      if (name == "__metadata__") {
        header.object([&](const std::string&) { header.string(); });
      } else if (!tensors.emplace(name, tensor_of(header, file, sizeof(length) + length)).second) {
        throw std::runtime_error("it has '" + name + "' twice");
      }
    });
    if (!header.at_end()) {
      throw std::runtime_error("its header goes on after its end");
    }
    return tensors;
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(path + " is not a readable safetensors file: " + error.what());
  }
}

}  // namespace safetensors
