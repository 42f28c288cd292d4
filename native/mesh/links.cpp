#include "links.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <sstream>
#include <stdexcept>

#include "mlx/types/half_types.h"

namespace cenacle {

static_assert(std::endian::native == std::endian::little, "the wire format is the memory's");

namespace {

using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;

constexpr uint32_t kMagic = 0x4d434e43;  // "CNCM"
constexpr uint16_t kVersion = 2;
constexpr uint8_t kDirect = 1, kScatter = 2, kGather = 3, kHeartbeat = 254, kLost = 255;
constexpr size_t kMaxSendBytes = 128 * 1024;  // most bytes given to a socket at once

template <typename T, typename Sum, typename Out>
void add(const std::vector<const void*>& from, void* to, size_t count) {
  // A block at a time: the running sums stay in the first-level cache.
  constexpr size_t kBlock = 1024;
  Sum sums[kBlock];
  for (size_t begin = 0; begin < count; begin += kBlock) {
    const size_t n = std::min(kBlock, count - begin);
    const T* first = static_cast<const T*>(from[0]) + begin;
    for (size_t i = 0; i < n; ++i) sums[i] = static_cast<Sum>(first[i]);
    for (size_t r = 1; r < from.size(); ++r) {
      const T* next = static_cast<const T*>(from[r]) + begin;
      for (size_t i = 0; i < n; ++i) sums[i] += static_cast<Sum>(next[i]);
    }
    Out* out = static_cast<Out*>(to) + begin;
    for (size_t i = 0; i < n; ++i) out[i] = static_cast<Out>(sums[i]);
  }
}

// bfloat16 that the compiler can widen and round eight at a time.
struct BFloat16 {
  uint16_t bits;
  BFloat16() = default;
  explicit BFloat16(float x) {
    const auto u = std::bit_cast<uint32_t>(x);
    const uint32_t even = (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // to nearest, ties to even
    const uint32_t nan = (u >> 16) | 0x40;
    bits = static_cast<uint16_t>((u & 0x7fffffff) > 0x7f800000 ? nan : even);
  }
  explicit operator float() const { return std::bit_cast<float>(uint32_t(bits) << 16); }
};

// The sum in the order of `from`, as it travels.
void add(Type type, const std::vector<const void*>& from, void* to, size_t count) {
  switch (type) {
    case Type::f32:
      return add<float, float, float>(from, to, count);
    case Type::bf16:
    case Type::f32_as_bf16:
      return add<BFloat16, float, BFloat16>(from, to, count);
    case Type::f16:
      return add<mlx::core::float16_t, float, mlx::core::float16_t>(from, to, count);
    case Type::i32:  // wraps as unsigned does, which is defined
    case Type::u32:
      return add<uint32_t, uint32_t, uint32_t>(from, to, count);
  }
  throw std::logic_error("no such type");
}

bool is_heartbeat(const Header& h) {
  return h.magic == kMagic && h.version == kVersion && h.kind == kHeartbeat;
}

std::string seconds(double s) {
  std::ostringstream out;
  out << s << " s";
  return out.str();
}

void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

size_t size_of(Type type) {
  return type == Type::bf16 || type == Type::f16 || type == Type::f32_as_bf16 ? 2 : 4;
}

const char* name_of(Type type) {
  switch (type) {
    case Type::f32:
      return "float32";
    case Type::bf16:
      return "bfloat16";
    case Type::f16:
      return "float16";
    case Type::i32:
      return "int32";
    case Type::u32:
      return "uint32";
    case Type::f32_as_bf16:
      return "float32 sent as bfloat16";
  }
  return "an unknown type";
}

// One message out to a peer and one in from it, each a header and its bytes. A null pointer with
// `bytes` 0 is a message without bytes; `done` from the start is no message at all.
struct Links::Flow {
  struct Half {
    Header header{};
    std::byte* data = nullptr;
    size_t done = 0;  // bytes of header and data that have gone
    size_t total() const { return sizeof(Header) + header.bytes; }
    bool over() const { return done == total(); }
    // The next piece as at most two parts.
    int parts(iovec* to) const {
      int n = 0;
      size_t room = kMaxSendBytes;
      if (done < sizeof(Header)) {
        to[n++] = {reinterpret_cast<std::byte*>(const_cast<Header*>(&header)) + done,
                   sizeof(Header) - done};
        room -= sizeof(Header) - done;
      }
      const size_t at = done < sizeof(Header) ? 0 : done - sizeof(Header);
      if (at < header.bytes) to[n++] = {data + at, std::min(room, size_t(header.bytes) - at)};
      return n;
    }
  };
  int peer;
  Half out;
  Half in;
  Header got{};  // what the peer's header says; `in.header` is what it must say
  Clock::time_point last_heard;  // a sign of life
  Clock::time_point moved;  // a byte of the messages themselves
  bool over() const { return out.over() && in.over(); }
};

Links::Links(int rank, std::vector<int> fds, Settings settings)
    : rank_(rank), fds_(std::move(fds)), settings_(settings), scratch_(fds_.size()) {
  if (size() > 1) heartbeat_ = std::thread([this] { run_heartbeat(); });
}

Links::~Links() {
  close();
  if (heartbeat_.joinable()) heartbeat_.join();
  for (int p = 0; p < size(); ++p) {
    if (p != rank_) ::close(fds_[p]);
  }
}

void Links::close() {
  {
    const std::lock_guard<std::mutex> lock(sleep_mutex_);
    if (closing_.exchange(true)) return;
  }
  wake_.notify_all();
  for (int p = 0; p < size(); ++p) {
    if (p != rank_) ::shutdown(fds_[p], SHUT_RDWR);  // wakes a thread that waits in poll
  }
}

// Signs of life while this rank computes. The others' are taken off the sockets too, or they would
// fill them where nobody asks anything for hours.
void Links::run_heartbeat() {
  std::unique_lock<std::mutex> sleep_lock(sleep_mutex_);
  const auto pause = Seconds(settings_.silence_s / kHeartbeatsPerSilence);
  while (!wake_.wait_for(sleep_lock, pause, [&] { return closing_.load(); })) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock || failed_) continue;
    for (int p = 0; p < size(); ++p) {
      if (p == rank_) continue;
      send_heartbeat(p);
      Header seen{};
      const auto take = [&](int flags) {
        return ::recv(fds_[p], &seen, sizeof seen, MSG_DONTWAIT | flags) == ssize_t(sizeof seen);
      };
      while (take(MSG_PEEK) && is_heartbeat(seen)) take(0);
    }
  }
}

// Between two messages only.
void Links::send_heartbeat(int peer) {
  const Header alive{kMagic, kVersion, kHeartbeat, 0, {}, 0};
  const ssize_t n = ::send(fds_[peer], &alive, sizeof alive, MSG_DONTWAIT | MSG_NOSIGNAL);
  // A peer that has taken nothing for hours has left room for a part: then nothing fits behind.
  if (n > 0 && n < ssize_t(sizeof alive)) ::shutdown(fds_[peer], SHUT_WR);
}

std::byte* Links::scratch(int peer, size_t bytes) {
  auto& own = scratch_[peer];
  if (own.size() < bytes) own.resize(bytes);
  return own.data();
}

Links::Flow Links::flow(
    int peer, uint8_t kind, const void* out, size_t out_bytes, void* in, size_t in_bytes) {
  const auto type = static_cast<uint8_t>(type_);
  Flow f{};
  f.peer = peer;
  f.out.header = {kMagic, kVersion, kind, type, tag_, out_bytes};
  f.out.data = static_cast<std::byte*>(const_cast<void*>(out));
  f.in.header = {kMagic, kVersion, kind, type, tag_, in_bytes};
  f.in.data = static_cast<std::byte*>(in);
  return f;
}

void Links::all_sum(const void* in, void* out, size_t count, Type type, Tag tag) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (failed_) throw std::runtime_error(broken_);
  tag_ = tag;
  if (type != Type::f32 || !settings_.bf16_wire) {
    type_ = type;
    all_reduce(static_cast<const std::byte*>(in), static_cast<std::byte*>(out), count);
    return;
  }
  type_ = Type::f32_as_bf16;
  std::byte* own = scratch(rank_, count * sizeof(BFloat16));
  add<float, float, BFloat16>({in}, own, count);
  all_reduce(own, static_cast<std::byte*>(out), count);
}

// `own` as it travels, `out` as it was asked for.
void Links::all_reduce(const std::byte* own, std::byte* out, size_t count) {
  const bool as_bf16 = type_ == Type::f32_as_bf16;
  const size_t width = size_of(type_), bytes = count * width;
  const int n = size();
  std::vector<Flow> flows;
  std::vector<const void*> vectors(n);
  flows.reserve(n - 1);

  if (bytes <= settings_.scatter_bytes || n == 2) {
    // Everything to everyone: one hop.
    for (int p = 0; p < n; ++p) {
      if (p == rank_) {
        vectors[p] = own;
        continue;
      }
      std::byte* theirs = scratch(p, bytes);
      vectors[p] = theirs;
      flows.push_back(flow(p, kDirect, own, bytes, theirs, bytes));
    }
    transfer(flows);
    compare(flows);
    if (as_bf16) {
      add<BFloat16, float, float>(vectors, out, count);
    } else {
      add(type_, vectors, out, count);
    }
    return;
  }

  // Each rank adds one part and sends the sum to all: two hops, and 2 / n of the bytes a link.
  // What was narrowed for the way is narrowed again for the second, here as on all other ranks.
  if (as_bf16 && bf16_sum_.size() < bytes) bf16_sum_.resize(bytes);
  std::byte* result = as_bf16 ? bf16_sum_.data() : out;
  const auto begin = [&](int r) { return count * r / n * width; };
  const auto length = [&](int r) { return begin(r + 1) - begin(r); };
  for (int p = 0; p < n; ++p) {
    if (p == rank_) {
      vectors[p] = own + begin(p);
      continue;
    }
    std::byte* theirs = scratch(p, length(rank_));
    vectors[p] = theirs;
    flows.push_back(flow(p, kScatter, own + begin(p), length(p), theirs, length(rank_)));
  }
  transfer(flows);
  compare(flows);
  add(type_, vectors, result + begin(rank_), length(rank_) / width);
  flows.clear();
  for (int p = 0; p < n; ++p) {
    if (p == rank_) continue;
    flows.push_back(
        flow(p, kGather, result + begin(rank_), length(rank_), result + begin(p), length(p)));
  }
  transfer(flows);
  if (as_bf16) add<BFloat16, float, float>({result}, out, count);
}

// Runs all messages to their ends. Sending never blocks receiving, so peers that all send at once
// cannot lock up, however large the vectors are.
void Links::transfer(std::vector<Flow>& flows) {
  flows_ = &flows;
  const auto time = [](double s) { return std::chrono::duration_cast<Clock::duration>(Seconds(s)); };
  const auto silence = time(settings_.silence_s), patience = time(settings_.deadline_s);
  auto now = Clock::now();
  auto next_heartbeat = now + silence / kHeartbeatsPerSilence;
  for (auto& f : flows) f.last_heard = f.moved = now;
  const auto spin = time(settings_.spin_us * 1e-6);
  auto spin_until = now + spin;
  std::vector<pollfd> waiting;
  bool first = true;

  while (true) {
    bool open = false, moved = false;
    for (size_t i = 0; i < flows.size(); ++i) {
      Flow& f = flows[i];
      const bool ready = first || waiting.empty() || waiting[i].revents != 0;
      if (ready && !f.out.over()) moved |= send(f);
    }
    for (size_t i = 0; i < flows.size(); ++i) {
      Flow& f = flows[i];
      const bool ready = first || waiting.empty() || waiting[i].revents != 0;
      if (ready && !f.in.over()) moved |= receive(f);
      open |= !f.over();
    }
    first = false;
    waiting.clear();
    if (!open) break;
    now = Clock::now();
    if (moved) {
      spin_until = now + spin;
      if (spin.count() > 0) continue;
    } else if (now < spin_until) {
      pause_cpu();
      continue;
    }
    if (now >= next_heartbeat) {
      // Whoever has all of this message may wait for the next one already.
      for (const auto& f : flows) {
        if (f.out.over() || f.out.done == 0) send_heartbeat(f.peer);
      }
      next_heartbeat = now + silence / kHeartbeatsPerSilence;
    }
    auto ends = next_heartbeat;
    for (const auto& f : flows) {
      const short events = (f.out.over() ? 0 : POLLOUT) | (f.in.over() ? 0 : POLLIN);
      waiting.push_back({f.over() ? -1 : fds_[f.peer], events, 0});
      if (!f.over()) ends = std::min({ends, f.last_heard + silence, f.moved + patience});
    }
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(ends - now).count();
    const int found = ::poll(
        waiting.data(), waiting.size(), static_cast<int>(std::clamp<int64_t>(left, 0, 60'000)));
    if (found < 0 && errno != EINTR) {
      abort(std::string("poll failed: ") + std::strerror(errno));
    }
    if (found != 0) continue;
    now = Clock::now();
    for (const auto& f : flows) {
      if (f.over()) continue;
      if (now >= f.last_heard + silence) {
        fail(f.peer, Fault::silent,
             (f.in.over() ? "took nothing for " : "sent nothing for ") + seconds(settings_.silence_s));
      }
      if (now >= f.moved + patience) {
        fail(f.peer, Fault::late, "did not come within " + seconds(settings_.deadline_s));
      }
    }
  }
  flows_ = nullptr;
}

bool Links::send(Flow& f) {
  bool moved = false;
  while (!f.out.over()) {
    iovec parts[2];
    msghdr message{};
    message.msg_iov = parts;
    message.msg_iovlen = f.out.parts(parts);
    const ssize_t n = ::sendmsg(fds_[f.peer], &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n > 0) {
      f.out.done += n;
      f.last_heard = f.moved = Clock::now();
      moved = true;
      if (!f.in.over()) break;  // let the other direction have its turn
    } else if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == ENOBUFS)) {
      break;
    } else if (n < 0 && errno != EINTR) {
      // What it said last, if anything, tells more than that it left.
      if (!f.in.over()) {
        f.out.done = f.out.total();
        return true;
      }
      fail(f.peer, Fault::closed, "closed its connection");
    }
  }
  return moved;
}

bool Links::receive(Flow& f) {
  bool moved = false;
  while (!f.in.over()) {
    // The header that is expected stays where it is; the one that comes goes beside it.
    iovec parts[2];
    msghdr message{};
    message.msg_iov = parts;
    message.msg_iovlen = f.in.parts(parts);
    if (f.in.done < sizeof(Header)) {
      parts[0].iov_base = reinterpret_cast<std::byte*>(&f.got) + f.in.done;
    }
    const size_t before = f.in.done;
    const ssize_t n = ::recvmsg(fds_[f.peer], &message, MSG_DONTWAIT);
    if (n > 0) {
      f.in.done += n;
      f.last_heard = Clock::now();
      moved = true;
      if (before >= sizeof(Header)) {
        f.moved = f.last_heard;
        continue;
      }
      while (f.in.done >= sizeof(Header) && is_heartbeat(f.got)) {
        // Only a sign of life: what came behind it moves up to where it belongs.
        const size_t more = f.in.done - sizeof(Header), head = std::min(more, sizeof(Header));
        if (more > 0) {
          std::memcpy(&f.got, f.in.data, head);
          std::memmove(f.in.data, f.in.data + head, more - head);
        }
        f.in.done = more;
      }
      if (f.in.done >= sizeof(Header)) {
        f.moved = f.last_heard;
        check(f);
      }
    } else if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
      break;
    } else if (n == 0 || errno != EINTR) {
      fail(f.peer, Fault::closed, "closed its connection");
    }
  }
  return moved;
}

void Links::check(const Flow& f) {
  const Header &want = f.in.header, &got = f.got;
  Header alike = got;
  alike.tag.digest = want.tag.digest;  // see `compare`
  if (std::memcmp(&want, &alike, sizeof(Header)) == 0) return;
  if (got.magic != kMagic || got.version != kVersion) {
    fail(f.peer, Fault::out_of_step, "sent what is not a message of this version");
  }
  if (got.kind == kLost) {
    // A peer gave up because of a third rank: say so in its place.
    const int lost = static_cast<int>(got.bytes);
    const char* how = got.type == uint8_t(Fault::silent)    ? "sent nothing"
                      : got.type == uint8_t(Fault::closed) ? "closed its connection"
                      : got.type == uint8_t(Fault::late)   ? "did not come"
                                                           : "is out of step";
    tag_ = got.tag;
    fail(lost, static_cast<Fault>(got.type),
         std::string(how) + ", says rank " + std::to_string(f.peer) + ",");
  }
  const auto describe = [](const Header& h) {
    std::ostringstream out;
    out << "all-reduce " << h.tag.number;
    if (h.tag.layer >= 0) out << " (layer " << h.tag.layer << ")";
    out << " of " << h.bytes << " bytes of " << name_of(static_cast<Type>(h.type));
    return out.str();
  };
  fail(f.peer, Fault::out_of_step,
       "is out of step: expected " + describe(want) + ", got " + describe(got));
}

// Every rank has every rank's digest by now and finds the same, so nobody need be told.
void Links::compare(const std::vector<Flow>& flows) {
  std::vector<uint32_t> digests(size(), tag_.digest);
  for (const auto& f : flows) digests[f.peer] = f.got.tag.digest;
  std::string mismatched;
  for (int p = 1; p < size(); ++p) {
    if (digests[p] != digests[0]) mismatched += (mismatched.empty() ? "" : ", ") + std::to_string(p);
  }
  if (mismatched.empty()) return;
  abort("rank " + mismatched + " chose other experts than rank 0 for the same tokens in " + where() +
            ": the step was given up, since its text would be wrong; use the same checkpoint, "
            "versions and kernels on all ranks");
}

std::string Links::where() const {
  std::string text = "all-reduce " + std::to_string(tag_.number);
  if (tag_.layer >= 0) text += ", layer " + std::to_string(tag_.layer);
  return text;
}

// Ends all all-reduces of this rank, and lets the others know who was the reason.
void Links::fail(int rank, Fault fault, const std::string& what) {
  std::ostringstream out;
  if (closing_) {
    out << "the all-reduce was cancelled while it waited in " << where();
  } else {
    out << "rank " << rank << " " << what;
    if (fault != Fault::out_of_step) out << " in " << where();
  }
  if (!closing_ && flows_ != nullptr) {
    const Header lost{kMagic, kVersion, kLost, uint8_t(fault), tag_, uint64_t(rank)};
    for (const auto& f : *flows_) {
      // Also to the rank itself, which may only have been stopped for a while. In the middle of
      // a message nothing else can be said.
      const bool between = f.out.over() || f.out.done == 0;
      if (!between || ::send(fds_[f.peer], &lost, sizeof lost, MSG_DONTWAIT | MSG_NOSIGNAL) < 0) {
        ::shutdown(fds_[f.peer], SHUT_WR);
      }
    }
  }
  abort(out.str());
}

void Links::abort(std::string why) {
  flows_ = nullptr;
  broken_ = std::move(why);
  failed_ = true;
  throw std::runtime_error(broken_);
}

}  // namespace cenacle
