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
constexpr uint16_t kVersion = 1;
constexpr uint8_t kDirect = 1, kScatter = 2, kGather = 3, kLost = 255;
constexpr size_t kPiece = 128 * 1024;  // most bytes given to a socket at once

template <typename T, typename Sum>
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
    T* out = static_cast<T*>(to) + begin;
    for (size_t i = 0; i < n; ++i) out[i] = static_cast<T>(sums[i]);
  }
}

// The sum in the order of `from`.
void add(Type type, const std::vector<const void*>& from, void* to, size_t count) {
  switch (type) {
    case Type::f32:
      return add<float, float>(from, to, count);
    case Type::bf16:
      return add<mlx::core::bfloat16_t, float>(from, to, count);
    case Type::f16:
      return add<mlx::core::float16_t, float>(from, to, count);
    case Type::i32:  // wraps as unsigned does, which is defined
    case Type::u32:
      return add<uint32_t, uint32_t>(from, to, count);
  }
  throw std::logic_error("no such type");
}

std::string seconds(double s) {
  std::ostringstream out;
  out << s << " s";
  return out.str();
}

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

size_t size_of(Type type) { return type == Type::bf16 || type == Type::f16 ? 2 : 4; }

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
      size_t room = kPiece;
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
  Clock::time_point heard;
  bool over() const { return out.over() && in.over(); }
};

Links::Links(int rank, std::vector<int> fds, Settings settings)
    : rank_(rank), fds_(std::move(fds)), settings_(settings), scratch_(fds_.size()) {}

Links::~Links() {
  for (int p = 0; p < size(); ++p) {
    if (p != rank_) ::close(fds_[p]);
  }
}

void Links::close() {
  if (closing_.exchange(true)) return;
  for (int p = 0; p < size(); ++p) {
    if (p != rank_) ::shutdown(fds_[p], SHUT_RDWR);  // wakes a thread that waits in poll
  }
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
  f.out.header = {kMagic, kVersion, kind, type, number_, out_bytes};
  f.out.data = static_cast<std::byte*>(const_cast<void*>(out));
  f.in.header = {kMagic, kVersion, kind, type, number_, in_bytes};
  f.in.data = static_cast<std::byte*>(in);
  return f;
}

void Links::all_sum(const void* in, void* out, size_t count, Type type, uint64_t number) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!broken_.empty()) throw std::runtime_error(broken_);
  type_ = type;
  number_ = number;
  const size_t width = size_of(type), bytes = count * width;
  const auto* own = static_cast<const std::byte*>(in);
  auto* result = static_cast<std::byte*>(out);
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
    add(type, vectors, result, count);
    return;
  }

  // Each rank adds one part and sends the sum to all: two hops, and 2 / n of the bytes a link.
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
  add(type, vectors, result + begin(rank_), length(rank_) / width);
  flows.clear();
  for (int p = 0; p < n; ++p) {
    if (p == rank_) continue;
    flows.push_back(
        flow(p, kGather, result + begin(rank_), length(rank_), result + begin(p), length(p)));
  }
  transfer(flows);
}

// Runs all messages to their ends. Sending never blocks receiving, so peers that all send at once
// cannot lock up, however large the vectors are.
void Links::transfer(std::vector<Flow>& flows) {
  flows_ = &flows;
  const auto spin = std::chrono::duration_cast<Clock::duration>(Seconds(settings_.spin_us * 1e-6));
  auto now = Clock::now();
  for (auto& f : flows) f.heard = now;
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
      relax();
      continue;
    }
    auto ends = Clock::time_point::max();
    const auto patience = std::chrono::duration_cast<Clock::duration>(Seconds(settings_.deadline_s));
    for (const auto& f : flows) {
      const short events = (f.out.over() ? 0 : POLLOUT) | (f.in.over() ? 0 : POLLIN);
      waiting.push_back({f.over() ? -1 : fds_[f.peer], events, 0});
      if (!f.over()) ends = std::min(ends, f.heard + patience);
    }
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(ends - now).count();
    const int found = ::poll(
        waiting.data(), waiting.size(), static_cast<int>(std::clamp<int64_t>(left, 0, 60'000)));
    if (found < 0 && errno != EINTR) {
      flows_ = nullptr;
      broken_ = std::string("poll failed: ") + std::strerror(errno);
      throw std::runtime_error(broken_);
    }
    if (found == 0 && Clock::now() >= ends) {
      const auto& late = *std::min_element(flows.begin(), flows.end(), [](auto& a, auto& b) {
        return std::make_pair(a.over(), a.heard) < std::make_pair(b.over(), b.heard);
      });
      fail(late.peer, Fault::silent,
           (late.in.over() ? "took nothing for " : "was silent for ") +
               seconds(settings_.deadline_s));
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
      f.heard = Clock::now();
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
      f.heard = Clock::now();
      moved = true;
      if (before < sizeof(Header) && f.in.done >= sizeof(Header)) check(f);
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
  if (std::memcmp(&want, &got, sizeof(Header)) == 0) return;
  if (got.magic != kMagic || got.version != kVersion) {
    fail(f.peer, Fault::out_of_step, "sent what is not a message of this version");
  }
  if (got.kind == kLost) {
    // A peer gave up because of a third rank: say so in its place.
    const int lost = static_cast<int>(got.bytes);
    const char* how = got.type == uint8_t(Fault::silent)    ? "was silent"
                      : got.type == uint8_t(Fault::closed) ? "closed its connection"
                                                           : "is out of step";
    number_ = got.number;
    fail(lost, static_cast<Fault>(got.type),
         std::string(how) + ", says rank " + std::to_string(f.peer) + ",");
  }
  const auto describe = [](const Header& h) {
    std::ostringstream out;
    out << "exchange " << h.number << " of " << h.bytes << " bytes of "
        << name_of(static_cast<Type>(h.type));
    return out.str();
  };
  fail(f.peer, Fault::out_of_step,
       "is out of step: expected " + describe(want) + ", got " + describe(got));
}

// Ends all exchanges of this rank, and lets the others know who was the reason.
void Links::fail(int rank, Fault fault, const std::string& what) {
  std::ostringstream out;
  if (closing_) {
    out << "the exchange was closed while it waited in exchange " << number_;
  } else {
    out << "rank " << rank << " " << what;
    if (fault != Fault::out_of_step) out << " in exchange " << number_;
  }
  broken_ = out.str();
  if (!closing_ && flows_ != nullptr) {
    const Header lost{kMagic, kVersion, kLost, uint8_t(fault), number_, uint64_t(rank)};
    for (const auto& f : *flows_) {
      // Also to the rank itself, which may only have been stopped for a while. In the middle of
      // a message nothing else can be said.
      const bool between = f.out.over() || f.out.done == 0;
      if (!between || ::send(fds_[f.peer], &lost, sizeof lost, MSG_DONTWAIT | MSG_NOSIGNAL) < 0) {
        ::shutdown(fds_[f.peer], SHUT_WR);
      }
    }
  }
  flows_ = nullptr;
  throw std::runtime_error(broken_);
}

}  // namespace cenacle
