// The connections of one rank to all others, and the sum over them. Knows no MLX and no Python.
//
// Every rank calls all_sum with the same numbers, counts and types in the same order. Vectors are
// added in rank order (in float32 for the floating types), so every rank has the same bits.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace cenacle {

// What travels; the order is part of the wire format.
enum class Type : uint8_t { f32 = 1, bf16 = 2, f16 = 3, i32 = 4, u32 = 5 };
size_t size_of(Type type);
const char* name_of(Type type);

struct Settings {
  double deadline_s;     // longest silence of a peer in an exchange
  size_t scatter_bytes;  // larger vectors go by reduce-scatter and all-gather
  double spin_us;        // how long to ask again before sleeping in poll; 0: never
};

// Stands in front of every message, little-endian.
struct Header {
  uint32_t magic;
  uint16_t version;
  uint8_t kind;
  uint8_t type;
  uint64_t number;
  uint64_t bytes;
};
static_assert(sizeof(Header) == 24);

class Links {
 public:
  // fds[p] is a connected stream socket to rank p; fds[rank] is ignored. Takes them over.
  Links(int rank, std::vector<int> fds, Settings settings);
  ~Links();
  Links(const Links&) = delete;
  Links& operator=(const Links&) = delete;

  int size() const { return static_cast<int>(fds_.size()); }

  // out = the sum of every rank's in; they must not overlap. Throws std::runtime_error that names
  // the rank which was silent, left, or is out of step; from then on every call throws the same.
  void all_sum(const void* in, void* out, size_t count, Type type, uint64_t number);

  // From any thread: ends an exchange that waits. The sockets are closed with the last reference.
  void close();

 private:
  struct Flow;
  enum class Fault : uint8_t { silent = 1, closed = 2, out_of_step = 3 };

  Flow flow(int peer, uint8_t kind, const void* out, size_t out_bytes, void* in, size_t in_bytes);
  void transfer(std::vector<Flow>& flows);
  bool send(Flow& flow);
  bool receive(Flow& flow);
  void check(const Flow& flow);
  [[noreturn]] void fail(int rank, Fault fault, const std::string& what);
  std::byte* scratch(int peer, size_t bytes);

  int rank_;
  std::vector<int> fds_;
  Settings settings_;
  std::vector<std::vector<std::byte>> scratch_;
  std::vector<Flow>* flows_ = nullptr;  // of the transfer that is under way
  Type type_ = Type::f32;
  uint64_t number_ = 0;
  std::mutex mutex_;
  std::atomic<bool> closing_ = false;
  std::string broken_;
};

}  // namespace cenacle
