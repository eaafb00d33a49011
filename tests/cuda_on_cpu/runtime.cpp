// The emulated device: fibers and their order, rendezvous, checks of memory, CUDA's host calls.
#include "device.h"
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifndef __x86_64__
#error "the emulation switches fibers on x86-64 only"
#endif

namespace emulated {

uint3 thread_idx{}, block_idx{};
dim3 block_dim, grid_dim;

namespace {

constexpr size_t kStack = 64 << 10, kGuard = 4 << 10, kSharedBytes = 48 << 10;
constexpr int kPoison = 0xCB;  // large and odd in every type
const auto kStream = reinterpret_cast<cudaStream_t>(0x5157);

struct Settings {
  double seed = 1, preempt = 0.1;  // chance of a switch at an atomic or volatile access
  double preempt_plain = 0;        // at any other access (instrumented builds)
  double resident = 3;             // blocks under way together
  double grid_x = 1e18, grid_y = 1e18, most_steps = 1e8;  // accesses of one launch
} settings;

uint64_t random_state = 1;
uint64_t draw() {  // splitmix64
  uint64_t z = random_state += 0x9E3779B97F4A7C15ull;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ z >> 27) * 0x94D049BB133111EBull;
  return z ^ z >> 31;
}
bool chance(double p) { return p > 0 && double(draw() >> 11) * 0x1p-53 < p; }

// ---- what is counted and found

struct Kernel {
  int64_t launches = 0, calls = 0, threads = 0, last_call = -1;
};
std::map<std::string, Kernel> kernels;
int64_t calls = 0, waits = 0;
std::map<std::string, int64_t> findings;  // "text \t kernel \t address \t address"
uintptr_t module_begin = 0, module_end = 0;

int find_module(dl_phdr_info* info, size_t, void*) {
  const auto self = reinterpret_cast<uintptr_t>(&settings);
  uintptr_t begin = UINTPTR_MAX, end = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& h = info->dlpi_phdr[i];
    if (h.p_type != PT_LOAD) continue;
    begin = std::min<uintptr_t>(begin, info->dlpi_addr + h.p_vaddr);
    end = std::max<uintptr_t>(end, info->dlpi_addr + h.p_vaddr + h.p_memsz);
  }
  if (self < begin || self >= end) return 0;
  module_begin = begin, module_end = end;
  return 1;
}

Site kernel{"the host", 0};
void found(const std::string& text, const void* a = nullptr, const void* b = nullptr) {
  const auto offset = [](const void* p) {  // of the call, which ends before its return address
    return p == nullptr ? 0 : reinterpret_cast<uintptr_t>(p) - module_begin - 1;
  };
  char places[64];
  snprintf(places, sizeof(places), "\t%zx\t%zx", size_t(offset(a)), size_t(offset(b)));
  ++findings[text + "\t" + kernel.name + places];
}
std::string at(Site site) { return std::string(site.name) + ", line " + std::to_string(site.line); }

// ---- fibers

extern "C" void emulated_switch(void** save, void* to);
asm(R"(
.text
.hidden emulated_switch
.globl emulated_switch
.type emulated_switch, @function
emulated_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulated_switch, .-emulated_switch
)");

struct Access {  // the last of its sort to a byte
  uint32_t thread = 0;  // in the grid, from 1
  uint16_t barriers = 0, syncs = 0;
  const void* pc = nullptr;
  bool strong = false;  // atomic or volatile
};
struct Cell {
  Access write, read, other_read;
  uint64_t launch = 0;
  bool known = true;  // written since it was allocated
};

struct Block;
struct Thread {
  enum { fresh, ready, waiting, done } state = fresh;
  void* sp = nullptr;
  char* stack = nullptr;
  void* fake = nullptr;  // AddressSanitizer's
  Block* block = nullptr;
  uint3 index{};
  int lane = 0;
  size_t warp = 0;
  uint32_t id = 0;
  uint16_t barriers = 0, syncs = 0;
  uint64_t result = 0;
  Site site{};
  unsigned mask = 0;
};
struct Meeting {
  Kind kind;
  Site site;
  unsigned mask, arrived = 0;
  std::array<uint64_t, 32> value;
  std::array<int, 32> source;
};
struct Warp {
  unsigned born = 0, alive = 0;
  std::vector<Meeting> meetings;
};
struct Shared {
  std::unique_ptr<char[]> data;
  size_t bytes = 0;
  std::vector<Cell> cells;
};
struct Block {
  uint3 index{};
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::map<const void*, Shared> shared;
  size_t shared_bytes = 0;
  size_t alive = 0, at_barrier = 0;
  int predicates = 0;
  Site barrier{};
};

void* scheduler_sp = nullptr;
Thread* current = nullptr;
void (*body)(void*) = nullptr;
char *arguments_begin = nullptr, *arguments_end = nullptr;
std::vector<Thread*> ready;
std::vector<char*> stacks;
std::string failure;
uint64_t launch_id = 0;
int64_t steps = 0;
#ifdef __SANITIZE_ADDRESS__
const void* scheduler_stack = nullptr;
size_t scheduler_size = 0;
#endif

void to_scheduler(bool last) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(last ? nullptr : &current->fake, scheduler_stack, scheduler_size);
#endif
  emulated_switch(&current->sp, scheduler_sp);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(current->fake, &scheduler_stack, &scheduler_size);
#endif
}
void wait_here() {
  current->state = Thread::waiting;
  to_scheduler(false);
}
void yield_here() {
  ready.push_back(current);
  to_scheduler(false);
}
void wake(Thread& t) {
  if (&t == current) return;
  t.state = Thread::ready;
  ready.push_back(&t);
}

[[noreturn]] void fail(const std::string& message, const void* pc = nullptr) {
  found(message, pc);
  if (failure.empty()) failure = message;
  current->state = Thread::done;
  to_scheduler(true);
  abort();
}

void complete(const Meeting& m, Block& block, size_t warp) {
  uint64_t ballot = 0, sum = 0;
  int64_t most = INT64_MIN, least = INT64_MAX;
  for (int l = 0; l < 32; ++l) {
    if (!(m.arrived >> l & 1)) continue;
    ballot |= (m.value[l] & 1) << l;
    sum += m.value[l];
    most = std::max(most, int64_t(m.value[l]));
    least = std::min(least, int64_t(m.value[l]));
  }
  for (int l = 0; l < 32; ++l) {
    if (!(m.arrived >> l & 1)) continue;
    Thread& t = block.threads[warp * 32 + size_t(l)];
    switch (m.kind) {
      case Kind::exchange:
        if (m.arrived >> m.source[l] & 1) {
          t.result = m.value[m.source[l]];
        } else {
          found("a value is taken from a lane that takes no part: " + at(m.site));
          t.result = 0xA5A5DEADBEEFA5A5ull;
        }
        break;
      case Kind::match:
        t.result = 0;
        for (int k = 0; k < 32; ++k)
          if ((m.arrived >> k & 1) && m.value[k] == m.value[l]) t.result |= 1u << k;
        break;
      case Kind::ballot: t.result = ballot; break;
      case Kind::max: t.result = uint64_t(most); break;
      case Kind::min: t.result = uint64_t(least); break;
      case Kind::add: t.result = sum; break;
      case Kind::sync: ++t.syncs; break;
    }
    wake(t);
  }
}

// Ends the meetings at which all lanes of the mask are.
void meet(Block& block, size_t index) {
  Warp& warp = block.warps[index];
  for (size_t i = 0; i < warp.meetings.size();) {
    const Meeting m = warp.meetings[i];
    if (m.arrived != (m.mask & (warp.alive | m.arrived))) {
      ++i;
      continue;
    }
    if (m.mask & ~m.arrived)
      found("the mask holds a lane that has ended or never was: " + at(m.site));
    warp.meetings.erase(warp.meetings.begin() + long(i));
    complete(m, block, index);
  }
}

void open_barrier(Block& block) {
  if (block.at_barrier == 0 || block.at_barrier != block.alive) return;
  if (block.alive != block.threads.size())
    found("a thread ended while others of its block wait: " + at(block.barrier));
  const int sum = block.predicates;
  block.at_barrier = 0, block.predicates = 0;
  for (Thread& t : block.threads) {
    if (t.state == Thread::done) continue;
    ++t.barriers;
    t.result = uint64_t(sum);
    wake(t);
  }
}

void entry() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
#endif
  body(arguments_begin);
  Block& block = *current->block;
  current->state = Thread::done;
  block.warps[current->warp].alive &= ~(1u << current->lane);
  --block.alive;
  meet(block, current->warp);
  open_barrier(block);
  to_scheduler(true);
  abort();
}

void resume(Thread* t) {
  current = t;
  thread_idx = t->index, block_idx = t->block->index;
  if (t->state == Thread::fresh) {
    if (stacks.empty()) {
      void* p = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (p == MAP_FAILED || mprotect(p, kGuard, PROT_NONE) != 0) throw std::bad_alloc();
      stacks.push_back(static_cast<char*>(p) + kGuard);
    }
    t->stack = stacks.back();
    stacks.pop_back();
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(t->stack, kStack);  // a fiber that was abandoned left it so
#endif
    auto** top = reinterpret_cast<void**>(t->stack + kStack);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&entry);
    t->sp = top - 6;
  }
  t->state = Thread::ready;
#ifdef __SANITIZE_ADDRESS__
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, t->stack, kStack);
#endif
  emulated_switch(&scheduler_sp, t->sp);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  current = nullptr;
}

// ---- device memory: what the launchers took the address of

constexpr uintptr_t kPage = 256;
struct Region {
  uintptr_t begin, end;
  bool fresh;  // allocated in this call: unknown until it is written
};
std::map<uintptr_t, Region> regions;  // by end
std::unordered_map<uintptr_t, std::vector<Cell>> pages;

Region* region_of(uintptr_t p) {
  const auto found = regions.upper_bound(p);
  return found == regions.end() || p < found->second.begin ? nullptr : &found->second;
}

// Overlapping views of one storage are one region.
void note_view(uintptr_t begin, uintptr_t end) {
  Region made{begin, end, false};
  for (auto i = regions.upper_bound(begin); i != regions.end() && i->second.begin < end;) {
    if (i->second.begin <= begin && i->second.end >= end) return;
    made = {std::min(made.begin, i->second.begin), std::max(made.end, i->second.end), false};
    i = regions.erase(i);
  }
  regions[made.end] = made;
}
// A new allocation replaces what was there.
void note_allocation(uintptr_t begin, uintptr_t end, bool fresh) {
  auto i = regions.upper_bound(begin);
  while (i != regions.end() && i->second.begin < end) i = regions.erase(i);
  regions[end] = {begin, end, fresh};
  for (uintptr_t page = begin / kPage; page <= (end - 1) / kPage; ++page) {
    const auto made = pages.find(page);
    if (made == pages.end()) continue;
    for (uintptr_t p = std::max(begin, page * kPage); p < std::min(end, (page + 1) * kPage); ++p)
      made->second[p % kPage] = Cell{}, made->second[p % kPage].known = !fresh;
  }
}

Cell& cell_of(uintptr_t p) {
  auto& page = pages[p / kPage];
  if (page.empty()) {
    page.resize(kPage);
    for (uintptr_t i = 0; i < kPage; ++i) {
      const Region* region = region_of(p / kPage * kPage + i);
      page[i].known = region == nullptr || !region->fresh;
    }
  }
  return page[p % kPage];
}

enum class Sort { read, write, atomic };

// Whether an earlier access is ordered before one of the current thread.
bool ordered(const Access& a) {
  if (a.thread == current->id) return true;
  const auto threads = uint32_t(current->block->threads.size());
  if ((a.thread - 1) / threads != (current->id - 1) / threads) return false;
  if (a.barriers < current->barriers) return true;
  return (a.thread - 1) % threads / 32 == current->warp && a.syncs < current->syncs;
}

void check_cell(Cell& c, Sort sort, bool strong, const void* pc, bool& told) {
  if (c.launch != launch_id) {
    c.launch = launch_id;
    c.write.thread = c.read.thread = c.other_read.thread = 0;
  }
  const auto race = [&](const Access& a, const char* text) {
    if (a.thread == 0 || (a.strong && strong) || ordered(a) || told) return;
    told = true;
    found(text, a.pc, pc);
  };
  if (sort != Sort::write && !c.known && !told) {
    told = true;
    found("a read of memory that nothing wrote", pc);
  }
  const bool reads = sort == Sort::read;
  race(c.write, reads ? "race: write, read" : "race: write, write");
  const Access now{current->id, current->barriers, current->syncs, pc, strong};
  if (reads) {
    if (c.read.thread != now.thread) c.other_read = c.read;
    c.read = now;
    return;
  }
  race(c.read, "race: read, write");
  race(c.other_read, "race: read, write");
  c.write = now;
  c.known = true;
}

void check(uintptr_t p, size_t bytes, Sort sort, bool strong, const void* pc) {
  const auto stack = reinterpret_cast<uintptr_t>(current->stack);
  if (p >= stack && p < stack + kStack) return;
  if (++steps > int64_t(settings.most_steps)) fail("a launch does not end", pc);
  bool told = false;
  for (auto& [key, shared] : current->block->shared) {
    const auto begin = reinterpret_cast<uintptr_t>(shared.data.get());
    if (p < begin || p >= begin + shared.bytes) continue;
    if (p + bytes > begin + shared.bytes) fail("an access beyond shared memory", pc);
    if (shared.cells.empty()) {
      shared.cells.resize(shared.bytes);
      for (Cell& c : shared.cells) c.known = false;
    }
    for (size_t i = 0; i < bytes; ++i)
      check_cell(shared.cells[p - begin + i], sort, strong, pc, told);
    return;
  }
  if (const Region* region = region_of(p)) {
    if (p + bytes > region->end) fail("an access beyond a tensor", pc);
    if ((bytes & (bytes - 1)) == 0 && p % std::min<size_t>(bytes, 16) != 0) fail("a misaligned access", pc);
    for (size_t i = 0; i < bytes; ++i) check_cell(cell_of(p + i), sort, strong, pc, told);
    return;
  }
  const auto held = reinterpret_cast<uintptr_t>(arguments_begin);
  if (sort == Sort::read && p >= held && p < reinterpret_cast<uintptr_t>(arguments_end)) return;
  if (p < module_begin || p >= module_end)
    fail(sort == Sort::read ? "a read of no device memory" : "a write of no device memory", pc);
}

bool instrumented = false;

// The hooks of -fsanitize=thread.
void hook(void* p, size_t bytes, Sort sort, bool strong, const void* pc) {
  instrumented = true;
  if (current == nullptr) return;  // the host's
  check(reinterpret_cast<uintptr_t>(p), bytes, sort, strong, pc);
  const auto stack = reinterpret_cast<char*>(p) - current->stack;
  if (stack >= 0 && stack < int64_t(kStack)) return;
  if (chance(strong ? settings.preempt : settings.preempt_plain)) yield_here();
}

}  // namespace

int64_t grid_limit(int axis, int64_t limit) {
  return std::min(limit, int64_t(axis == 0 ? settings.grid_x : settings.grid_y));
}
int lane() { return current->lane; }

uint64_t collective(Kind kind, Site site, unsigned mask, uint64_t value, int source) {
  Thread& me = *current;
  if (!(mask >> me.lane & 1)) fail("the mask leaves out the lane that calls: " + at(site));
  Warp& warp = me.block->warps[me.warp];
  const auto same = std::find_if(warp.meetings.begin(), warp.meetings.end(), [&](Meeting& m) {
    return m.kind == kind && m.mask == mask && m.site.line == site.line &&
           !strcmp(m.site.name, site.name);
  });
  Meeting* meeting = same == warp.meetings.end() ? nullptr : &*same;
  if (meeting == nullptr) {
    for (const Meeting& m : warp.meetings)
      if ((m.arrived & mask) && (m.mask >> me.lane & 1))
        fail("lanes that name each other are at different calls: " + at(m.site) + ", and " +
             at(site));
    warp.meetings.push_back({kind, site, mask, 0, {}, {}});
    meeting = &warp.meetings.back();
  }
  const unsigned bit = 1u << me.lane;
  meeting->arrived |= bit;
  meeting->value[size_t(me.lane)] = value;
  meeting->source[size_t(me.lane)] = source & 31;
  me.site = site, me.mask = mask;
  meet(*me.block, me.warp);
  bool waits_ = false;
  for (const Meeting& m : warp.meetings) waits_ |= (m.arrived & bit) != 0;
  if (waits_) wait_here();
  else if (chance(0.5)) yield_here();
  return me.result;
}

int barrier(Site site, int predicate) {
  Thread& me = *current;
  Block& block = *me.block;
  if (block.at_barrier == 0) block.barrier = site;
  else if (block.barrier.line != site.line)
    found("threads of one block are at different barriers: " + at(block.barrier) + ", and " +
          at(site));
  ++block.at_barrier;
  block.predicates += predicate;
  me.site = site, me.mask = 0;
  const uint16_t before = me.barriers;
  open_barrier(block);
  if (me.barriers == before) wait_here();
  else if (chance(0.5)) yield_here();
  return int(me.result);
}

void* shared_memory(const void* key, size_t bytes) {
  Block& block = *current->block;
  Shared& shared = block.shared[key];
  if (shared.data == nullptr && bytes > 0) {
    block.shared_bytes += bytes;
    if (block.shared_bytes > kSharedBytes) fail("more than 48 KiB of shared memory");
    shared.data.reset(new char[bytes]);
    shared.bytes = bytes;
    memset(shared.data.get(), kPoison, bytes);
  }
  return shared.data.get();
}

void before_atomic(const volatile void* p, size_t bytes, const void* pc) {
  if (instrumented)
    check(reinterpret_cast<uintptr_t>(p), bytes, Sort::atomic, true, pc);
  else if (++steps > int64_t(settings.most_steps))
    fail("a launch does not end", pc);
  if (chance(settings.preempt)) yield_here();
}

namespace {
cudaError_t last_error = cudaSuccess;
bool unchecked = false;
int64_t guards = 0;

cudaError_t refusal(const Config& c, size_t parameter_bytes) {
  const uint64_t threads = uint64_t(c.block.x) * c.block.y * c.block.z;
  const bool empty = threads == 0 || c.grid.x == 0 || c.grid.y == 0 || c.grid.z == 0;
  const bool wide = c.block.x > 1024 || c.block.y > 1024 || c.block.z > 64 || threads > 1024;
  const bool far = c.grid.x > 0x7fffffffu || c.grid.y > 65535 || c.grid.z > 65535;
  if (empty || wide || far) return cudaErrorInvalidConfiguration;
  return c.shared > kSharedBytes || parameter_bytes > 4096 ? cudaErrorInvalidValue : cudaSuccess;
}

std::unique_ptr<Block> make_block(const Config& c, uint64_t number) {
  auto b = std::make_unique<Block>();
  const auto& [gx, gy, gz] = std::array{c.grid.x, c.grid.y, c.grid.z};
  b->index = {unsigned(number % gx), unsigned(number / gx % gy), unsigned(number / gx / gy)};
  const size_t threads = size_t(c.block.x) * c.block.y * c.block.z;
  b->threads.resize(threads);
  b->warps.resize((threads + 31) / 32);
  b->alive = threads;
  b->shared_bytes = c.shared;
  if (c.shared > 0) {
    Shared& dynamic = b->shared[nullptr];
    dynamic.data.reset(new char[c.shared]);
    dynamic.bytes = c.shared;
    memset(dynamic.data.get(), kPoison, c.shared);
  }
  for (size_t k = 0; k < threads; ++k) {
    Thread& t = b->threads[k];
    t.block = b.get();
    t.id = uint32_t(number * threads + k + 1);
    t.lane = int(k % 32), t.warp = k / 32;
    t.index = {unsigned(k % c.block.x), unsigned(k / c.block.x % c.block.y),
               unsigned(k / c.block.x / c.block.y)};
    Warp& warp = b->warps[t.warp];
    warp.alive = warp.born |= 1u << t.lane;
    ready.push_back(&t);
  }
  return b;
}

std::string deadlock(const std::vector<std::unique_ptr<Block>>& resident) {
  for (const auto& b : resident)
    for (const Thread& t : b->threads)
      if (t.state == Thread::waiting) {
        char mask[16];
        snprintf(mask, sizeof(mask), "%08x", t.mask);
        return "deadlock: a thread waits for ever at " + at(t.site) + ", mask " + mask;
      }
  return "deadlock";
}
}  // namespace

// Blocks start in a random order, a few under way together; who runs next is drawn.
void run(const Config& c, Site site, void* arguments, size_t bytes, void (*thread)(void*)) {
  if (module_end == 0) dl_iterate_phdr(find_module, nullptr);
  kernel = site;
  if (unchecked) found("the launch before this one was not checked");
  unchecked = true;
  if (c.stream != kStream) found("the launch is not on the current stream");
  if (guards == 0) found("the launch is under no device guard");
  last_error = refusal(c, bytes);
  if (last_error != cudaSuccess) return;
  const uint64_t blocks = uint64_t(c.grid.x) * c.grid.y * c.grid.z;
  Kernel& counted = kernels[site.name];
  ++counted.launches;
  counted.calls += counted.last_call != calls;
  counted.last_call = calls;
  counted.threads += int64_t(blocks * c.block.x * c.block.y * c.block.z);

  body = thread;
  arguments_begin = static_cast<char*>(arguments);
  arguments_end = arguments_begin + bytes;
  grid_dim = c.grid, block_dim = c.block;
  ++launch_id;
  steps = 0;
  failure.clear();
  std::vector<uint32_t> order(blocks);
  for (uint64_t i = 0; i < blocks; ++i) std::swap(order[i] = uint32_t(i), order[draw() % (i + 1)]);
  std::vector<std::unique_ptr<Block>> resident;
  uint64_t next = 0;
  while (failure.empty()) {
    while (resident.size() < size_t(settings.resident) && next < blocks)
      resident.push_back(make_block(c, order[next++]));
    if (resident.empty()) break;
    if (ready.empty()) {
      failure = deadlock(resident);
      found(failure);
      break;
    }
    std::swap(ready[draw() % ready.size()], ready.back());
    Thread* t = ready.back();
    ready.pop_back();
    resume(t);
    if (t->state != Thread::done) continue;
    stacks.push_back(t->stack);
    if (t->block->alive == 0)
      resident.erase(std::find_if(resident.begin(), resident.end(),
                                  [&](auto& b) { return b.get() == t->block; }));
  }
  for (auto& b : resident)  // of a launch that failed
    for (Thread& t : b->threads)
      if (t.state != Thread::fresh && t.state != Thread::done) stacks.push_back(t.stack);
  ready.clear();
  if (!failure.empty())
    throw std::runtime_error(std::string("emulated device: ") + site.name + ": " + failure);
}

}  // namespace emulated

using namespace emulated;

namespace {
struct Copy {
  void* to;
  std::vector<char> data;
};
std::vector<Copy> copies;  // to the host: they arrive when it waits

template <class F> F* original(const char* name) {
  auto* f = reinterpret_cast<F*>(dlsym(RTLD_NEXT, name));
  if (f == nullptr) throw std::runtime_error(std::string("torch has no ") + name);
  return f;
}

void note_tensor(AtenTensorHandle t, const void* data) {
  int64_t dim = 0, *sizes = nullptr, *strides = nullptr, last = 0;
  int32_t dtype = 0;
  aoti_torch_get_dim(t, &dim);
  aoti_torch_get_sizes(t, &sizes);
  aoti_torch_get_strides(t, &strides);
  aoti_torch_get_dtype(t, &dtype);
  for (int64_t i = 0; i < dim; ++i) {
    if (sizes[i] == 0) return;
    last += (sizes[i] - 1) * strides[i];
  }
  const auto begin = reinterpret_cast<uintptr_t>(data);
  note_view(begin, begin + uintptr_t(last + 1) * aoti_torch_dtype_element_size(dtype));
}

bool on_device(const void* p, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(p);
  const Region* region = region_of(begin);
  return bytes == 0 || (region != nullptr && begin + bytes <= region->end);
}
}  // namespace

// ---- what the kernels and their launchers call

#define EMULATED_HOOK(bytes)                                                                   \
  void __tsan_read##bytes(void* p) { hook(p, bytes, Sort::read, false, PC); }                  \
  void __tsan_write##bytes(void* p) { hook(p, bytes, Sort::write, false, PC); }                \
  void __tsan_unaligned_read##bytes(void* p) { hook(p, bytes, Sort::read, false, PC); }        \
  void __tsan_unaligned_write##bytes(void* p) { hook(p, bytes, Sort::write, false, PC); }      \
  void __tsan_volatile_read##bytes(void* p) { hook(p, bytes, Sort::read, true, PC); }          \
  void __tsan_volatile_write##bytes(void* p) { hook(p, bytes, Sort::write, true, PC); }
#define PC __builtin_return_address(0)

extern "C" {

EMULATED_HOOK(1) EMULATED_HOOK(2) EMULATED_HOOK(4) EMULATED_HOOK(8) EMULATED_HOOK(16)
void __tsan_read_range(void* p, size_t bytes) { hook(p, bytes, Sort::read, false, PC); }
void __tsan_write_range(void* p, size_t bytes) { hook(p, bytes, Sort::write, false, PC); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() { instrumented = true; }
// Of the host's code: virtual tables, guards of local statics, reference counts.
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
uint8_t __tsan_atomic8_load(const volatile uint8_t* p, int) { return *p; }
uint32_t __tsan_atomic32_fetch_add(volatile uint32_t* p, uint32_t v, int) {
  return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);
}

cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream) {
  if (stream != kStream) found("cudaMemsetAsync is not on the current stream");
  if (!on_device(p, bytes)) {
    found("cudaMemsetAsync beyond device memory");
    return cudaErrorInvalidValue;
  }
  memset(p, value, bytes);
  const auto begin = reinterpret_cast<uintptr_t>(p);
  if (instrumented)
    for (size_t i = 0; i < bytes; ++i) cell_of(begin + i).known = true;
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  if (stream != kStream) found("cudaMemcpyAsync is not on the current stream");
  if ((kind != cudaMemcpyHostToDevice && !on_device(from, bytes)) ||
      (kind != cudaMemcpyDeviceToHost && !on_device(to, bytes))) {
    found("cudaMemcpyAsync beyond device memory");
    return cudaErrorInvalidValue;
  }
  if (kind == cudaMemcpyDeviceToHost) {
    const auto* data = static_cast<const char*>(from);
    copies.push_back({to, {data, data + bytes}});
    memset(to, kPoison, bytes);
  } else {
    memcpy(to, from, bytes);
  }
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
  ++waits;
  for (const Copy& c : copies) memcpy(c.to, c.data.data(), c.data.size());
  copies.clear();
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return cudaStreamSynchronize(kStream); }
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  const cudaError_t e = cudaMemcpyAsync(to, from, bytes, kind, kStream);
  return e == cudaSuccess ? cudaStreamSynchronize(kStream) : e;
}
cudaError_t cudaGetLastError() {
  unchecked = false;
  return std::exchange(last_error, cudaSuccess);
}
const char* cudaGetErrorString(cudaError_t e) {
  return e == cudaErrorInvalidConfiguration ? "invalid configuration argument"
         : e == cudaErrorInvalidValue       ? "invalid argument"
         : e == cudaSuccess                 ? "no error" : "emulated error";
}
const char* cudaGetErrorName(cudaError_t e) {
  return e == cudaErrorInvalidConfiguration ? "cudaErrorInvalidConfiguration"
         : e == cudaErrorInvalidValue       ? "cudaErrorInvalidValue"
         : e == cudaSuccess                 ? "cudaSuccess" : "cudaErrorUnknown";
}

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  if (guards == 0) found("the stream is asked for under no device guard");
  *stream = kStream;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  calls += guards++ == 0;
  *guard = reinterpret_cast<DeviceGuardHandle>(&guards);
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) {
  if (--guards > 0) return AOTI_TORCH_SUCCESS;
  if (!copies.empty()) found("the host did not wait for a copy to it");
  if (unchecked && failure.empty()) found("the last launch was not checked");
  copies.clear();
  regions.clear();
  pages.clear();
  unchecked = false;
  kernel = {"the host", 0};
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError torch_c10_cuda_check_msg(int32_t error, const char*, const char*, uint32_t, bool,
                                        char** message) {
  const std::string text = std::string("CUDA error: ") + cudaGetErrorString(cudaError_t(error));
  *message = error == cudaSuccess ? nullptr : strdup(text.c_str());
  return AOTI_TORCH_SUCCESS;
}
void torch_c10_cuda_free_error_msg(char* message) { free(message); }

AOTITorchError aoti_torch_get_data_ptr(AtenTensorHandle t, void** p) {
  static auto* f = original<decltype(aoti_torch_get_data_ptr)>("aoti_torch_get_data_ptr");
  const AOTITorchError e = f(t, p);
  note_tensor(t, *p);
  return e;
}
AOTITorchError torch_get_mutable_data_ptr(AtenTensorHandle t, void** p) {
  static auto* f = original<decltype(torch_get_mutable_data_ptr)>("torch_get_mutable_data_ptr");
  const AOTITorchError e = f(t, p);
  note_tensor(t, *p);
  return e;
}
AOTITorchError torch_get_const_data_ptr(AtenTensorHandle t, const void** p) {
  static auto* f = original<decltype(torch_get_const_data_ptr)>("torch_get_const_data_ptr");
  const AOTITorchError e = f(t, p);
  note_tensor(t, *p);
  return e;
}
// New memory is poisoned, and unknown until it is written; a copy's is known.
AOTITorchError torch_call_dispatcher(const char* op, const char* overload, StableIValue* stack,
                                     uint64_t version) {
  static auto* f = original<decltype(torch_call_dispatcher)>("torch_call_dispatcher");
  const AOTITorchError e = f(op, overload, stack, version);
  const bool fresh = strcmp(op, "aten::empty") == 0;
  if (e != AOTI_TORCH_SUCCESS || !(fresh || strcmp(op, "aten::contiguous") == 0)) return e;
  const auto t = reinterpret_cast<AtenTensorHandle>(stack[0]);
  static auto* pointer = original<decltype(aoti_torch_get_data_ptr)>("aoti_torch_get_data_ptr");
  void* data = nullptr;
  int64_t bytes = 0;
  pointer(t, &data);
  aoti_torch_get_numel(t, &bytes);
  int32_t dtype = 0;
  aoti_torch_get_dtype(t, &dtype);
  bytes *= int64_t(aoti_torch_dtype_element_size(dtype));
  if (bytes == 0) return e;
  if (fresh) memset(data, kPoison, size_t(bytes));
  const auto begin = reinterpret_cast<uintptr_t>(data);
  note_allocation(begin, begin + uintptr_t(bytes), fresh);
  return e;
}

// ---- for Python

#define EXPORTED __attribute__((visibility("default")))
EXPORTED int emulated_set(const char* name, double value) {
  const std::map<std::string, double*> all = {
      {"seed", &settings.seed}, {"preempt", &settings.preempt},
      {"preempt_plain", &settings.preempt_plain}, {"resident", &settings.resident},
      {"grid_x", &settings.grid_x}, {"grid_y", &settings.grid_y},
      {"most_steps", &settings.most_steps}};
  const auto found = all.find(name);
  if (found == all.end()) return 0;
  *found->second = value;
  random_state = uint64_t(settings.seed);
  return 1;
}
EXPORTED int64_t emulated_waits() { return waits; }
EXPORTED int64_t emulated_calls() { return calls; }
// Lines "kernel \t launches \t calls \t threads".
EXPORTED const char* emulated_kernels() {
  static std::string text;
  text.clear();
  for (const auto& [name, k] : kernels)
    text += name + "\t" + std::to_string(k.launches) + "\t" + std::to_string(k.calls) + "\t" +
            std::to_string(k.threads) + "\n";
  return text.c_str();
}
// Lines "text \t kernel \t address \t address \t times"; forgets them.
EXPORTED const char* emulated_findings() {
  static std::string text;
  text.clear();
  for (const auto& [line, times] : findings) text += line + "\t" + std::to_string(times) + "\n";
  findings.clear();
  return text.c_str();
}
}
