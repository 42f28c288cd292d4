// The connections of one rank to all others, and the sum over them. Knows no MLX and no Python.
//
// Every rank calls all_sum with the same tags, counts and types in the same order. Vectors are
// added in rank order (in float32 for the floating types), so every rank has the same bits.
//
// Two kinds of waiting: a rank whose process lives says so some twenty times in `silence_s`, from a
// thread of its own, so one that is stopped or unplugged is found soon; one that lives may compute
// for `deadline_s` before it comes.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace cenacle {

// What travels; the order is part of the wire format. The last is float32 whose vectors are rounded
// to bfloat16 for the way, this rank's own too, so that all add the same.
enum class Type : uint8_t { f32 = 1, bf16 = 2, f16 = 3, i32 = 4, u32 = 5, f32_as_bf16 = 6 };
size_t size_of(Type type);  // on the wire
const char* name_of(Type type);

constexpr int kHeartbeatsPerSilence = 20;  // in `silence_s`: some come through soon after a cable is back

struct Settings {
  double silence_s;      // longest time without a sign of life from a peer that is waited for
  double deadline_s;     // longest wait for a peer that lives
  size_t scatter_bytes;  // larger vectors go by reduce-scatter and all-gather
  double spin_us;        // how long to ask again before sleeping in poll; 0: never
  bool bf16_wire;        // send float32 vectors as f32_as_bf16
};

// Which all-reduce this is.
struct Tag {
  uint64_t number;
  int32_t layer;    // of the model, for messages; negative: none
  uint32_t digest;  // of what all ranks must have decided alike; 0: nothing
};

// Stands in front of every message, little-endian.
struct Header {
  uint32_t magic;
  uint16_t version;
  uint8_t kind;
  uint8_t type;
  Tag tag;
  uint64_t bytes;
};
static_assert(sizeof(Tag) == 16 && sizeof(Header) == 32);

class Links {
 public:
  // fds[p] is a connected stream socket to rank p; fds[rank] is ignored. Takes them over.
  Links(int rank, std::vector<int> fds, Settings settings);
  ~Links();
  Links(const Links&) = delete;
  Links& operator=(const Links&) = delete;

  int size() const { return static_cast<int>(fds_.size()); }

  // out = the sum of every rank's in; they must not overlap. Throws std::runtime_error that names
  // the rank which was silent, left, is out of step, or has another digest than rank 0; from then
  // on every call throws the same.
  void all_sum(const void* in, void* out, size_t count, Type type, Tag tag);

  // From any thread, without waiting: why no all-reduce works any more; null: they do.
  const char* failure() const { return failed_ ? broken_.c_str() : nullptr; }

  // From any thread: ends an all-reduce that waits. The sockets are closed with the last reference.
  void close();

 private:
  struct Flow;
  enum class Fault : uint8_t { silent = 1, closed = 2, out_of_step = 3, late = 4 };

  void all_reduce(const std::byte* own, std::byte* out, size_t count);
  Flow flow(int peer, uint8_t kind, const void* out, size_t out_bytes, void* in, size_t in_bytes);
  void transfer(std::vector<Flow>& flows);
  bool send(Flow& flow);
  bool receive(Flow& flow);
  void check(const Flow& flow);
  void compare(const std::vector<Flow>& flows);
  void send_heartbeat(int peer);
  void run_heartbeat();
  std::string where() const;
  [[noreturn]] void abort(std::string why);
  [[noreturn]] void fail(int rank, Fault fault, const std::string& what);
  std::byte* scratch(int peer, size_t bytes);

  int rank_;
  std::vector<int> fds_;
  Settings settings_;
  std::vector<std::vector<std::byte>> scratch_;  // a peer's vector; at rank_, what is sent
  std::vector<std::byte> bf16_sum_;                // the sum, where it comes as bfloat16
  std::vector<Flow>* flows_ = nullptr;           // of the transfer that is under way
  Type type_ = Type::f32;
  Tag tag_{};
  std::mutex mutex_;  // held by a transfer, which then gives the signs of life itself
  std::atomic<bool> closing_ = false;
  std::string broken_;  // written once, before `failed_`
  std::atomic<bool> failed_ = false;
  std::mutex sleep_mutex_;
  std::condition_variable wake_;
  std::thread heartbeat_;
};

}  // namespace cenacle
