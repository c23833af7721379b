// Compiled kernels on disk: a phone takes minutes to compile what it loads in a moment.
//
// One file holds the binaries of one module for one device and one version of its driver; its name is the digest of
// all three. A file is written beside its place and renamed, and whatever is not exactly what was written is ignored.
#pragma once

#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

namespace saevit {

// Two independent 64-bit sums over the bytes: against accidents, not against an enemy.
inline std::string Digest(const std::string& text) {
  uint64_t a = 0xcbf29ce484222325, b = 0x9e3779b97f4a7c15;
  for (unsigned char byte : text) {
    a = (a ^ byte) * 0x100000001b3;
    b = (b + byte) * 0xbf58476d1ce4e5b9;
    b ^= b >> 29;
  }
  char hex[33];
  snprintf(hex, sizeof(hex), "%016llx%016llx", static_cast<unsigned long long>(a), static_cast<unsigned long long>(b));
  return hex;
}

using Binaries = std::vector<std::string>;

class BinaryCache {
 public:
  // `identity` tells device and driver apart.
  BinaryCache(const std::string& identity, const std::string& source) {
    folder_ = Folder();
    if (!folder_.empty()) path_ = folder_ + "/" + Digest(identity + '\0' + source) + ".bin";
  }

  // Empty when there is no sound entry.
  Binaries Load() const {
    std::string all;
    if (path_.empty() || !ReadFile(&all)) return {};
    size_t head = sizeof(kMagic) - 1 + 32;
    if (all.size() < head || all.compare(0, sizeof(kMagic) - 1, kMagic) != 0) return {};
    std::string body = all.substr(head);
    if (Digest(body) != all.substr(sizeof(kMagic) - 1, 32)) return {};
    Binaries found;
    size_t at = 0;
    while (at < body.size()) {
      std::string binary;
      if (!Take(body, &at, &binary)) return {};
      found.push_back(std::move(binary));
    }
    return found;
  }

  // Failing to keep them only costs the next start its time.
  void Store(const Binaries& binaries) const {
    if (path_.empty()) return;
    std::string body;
    for (const std::string& binary : binaries) Put(&body, binary);
    MakeFolder();
    // Not by the number of this process: another container that shares the folder may have the same.
    std::string all = kMagic + Digest(body) + body, temporary = path_ + ".XXXXXX";
    int descriptor = mkstemp(&temporary[0]);
    FILE* file = descriptor < 0 ? nullptr : fdopen(descriptor, "wb");
    if (file == nullptr) return;
    bool whole = fwrite(all.data(), 1, all.size(), file) == all.size() && fflush(file) == 0 && fsync(fileno(file)) == 0;
    whole = fclose(file) == 0 && whole;
    if (!whole || rename(temporary.c_str(), path_.c_str()) != 0) remove(temporary.c_str());
  }

 private:
  static constexpr char kMagic[] = "SAEVITCL1\n";
  std::string folder_, path_;

  // In $SAEVIT_TVM_CACHE or ~/.cache/saevit-tvm; none where there is neither. It may well be read only.
  static std::string Folder() {
    const char* chosen = getenv("SAEVIT_TVM_CACHE");
    const char* home = getenv("HOME");
    std::string folder;
    if (chosen && *chosen) {
      folder = chosen;
    } else if (home && *home) {
      folder = std::string(home) + "/.cache/saevit-tvm";
    } else {
      return "";
    }
    return folder + "/opencl";
  }

  void MakeFolder() const {
    for (size_t slash = folder_.find('/', 1);; slash = folder_.find('/', slash + 1)) {
      mkdir(folder_.substr(0, slash).c_str(), 0700);
      if (slash == std::string::npos) break;
    }
  }

  bool ReadFile(std::string* all) const {
    FILE* file = fopen(path_.c_str(), "rb");
    if (file == nullptr) return false;
    char part[1 << 16];
    for (size_t n; (n = fread(part, 1, sizeof(part), file)) > 0;) all->append(part, n);
    bool sound = !ferror(file);
    fclose(file);
    return sound;
  }

  static void Put(std::string* body, const std::string& text) {
    uint64_t size = text.size();
    body->append(reinterpret_cast<const char*>(&size), sizeof(size)).append(text);
  }

  static bool Take(const std::string& body, size_t* at, std::string* text) {
    uint64_t size;
    if (body.size() - *at < sizeof(size)) return false;
    memcpy(&size, body.data() + *at, sizeof(size));
    *at += sizeof(size);
    if (body.size() - *at < size) return false;
    *text = body.substr(*at, size);
    *at += size;
    return true;
  }
};

}  // namespace saevit
