// What comes before and after generated CUDA C++ so that this machine's compiler makes it a library of kernels that
// driver.c can launch: block by block, the threads of one as coroutines that meet at __syncthreads, and those of a warp
// where they hand each other numbers. Products on tensor cores are emulated: a thread has eight neighbours of one row of
// the sums, and what they are computed from.
#ifndef HOST_KERNELS
#define HOST_KERNELS
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <ucontext.h>
#include <vector_functions.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#undef __shared__
#undef __launch_bounds__
#define __shared__ static
#define __launch_bounds__(...)
#define __expf expf
#define alignas(bytes) __attribute__((aligned(bytes)))

using std::max;
using std::min;
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

// Constants of math_constants.h, infinity among them, are numbers by their bits.
template <typename To, typename From> static inline To of_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "bits are bits");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
static inline float __int_as_float(int bits) { return of_bits<float>(bits); }
static inline int __float_as_int(float x) { return of_bits<int>(x); }
static inline double __longlong_as_double(long long bits) { return of_bits<double>(bits); }

static uint3 threadIdx, blockIdx;

namespace host {

constexpr unsigned WARP = 32;

struct Thread {
    ucontext_t context;
    uint3 index;
    unsigned number;
    bool done;
    bool for_warp;  // it waits for the others of its warp, and not for all of its block
    char given[8];  // what it hands to others
    std::vector<char> stack;
};

static ucontext_t scheduler;
static Thread *current;
static const std::function<void()> *work;
static bool met;  // some thread waited for others
static std::vector<Thread> threads;  // of a block

static void begin() {
    (*work)();
    current->done = true;
}

static void start(Thread &thread) {
    thread.stack.resize(1 << 16);
    thread.done = thread.for_warp = false;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = &scheduler;
    makecontext(&thread.context, begin, 0);
}

static void go_on(Thread &thread) {
    if (thread.done) return;
    current = &thread;
    threadIdx = thread.index;
    swapcontext(&scheduler, &thread.context);
}

static void wait(bool for_warp) {
    met = true;
    current->for_warp = for_warp;
    swapcontext(&current->context, &scheduler);
}

// All threads wait or are done. Those go on first that wait for their warp; whether any thread was left.
static bool step() {
    bool left = false, for_warp = false;
    for (Thread &thread : threads) {
        left |= !thread.done;
        for_warp |= !thread.done && thread.for_warp;
    }
    for (Thread &thread : threads)
        if (thread.for_warp == for_warp) {
            thread.for_warp = false;
            go_on(thread);
        }
    return left;
}

// The number that a lane of the warp gives; one's own where there is no such thread.
template <class T>
T from_lane(T value, unsigned lane) {
    static_assert(sizeof(T) <= sizeof(Thread::given), "a number");
    Thread &mine = *current;
    unsigned other = mine.number / WARP * WARP + lane;
    memcpy(mine.given, &value, sizeof value);
    wait(true);
    if (other < threads.size() && !threads[other].done) memcpy(&value, threads[other].given, sizeof value);
    wait(true);  // until all have read
    return value;
}

static unsigned lane() { return current->number % WARP; }

static void one_block() {
    for (Thread &thread : threads) thread.done = false;
    met = false;
    start(threads[0]);
    go_on(threads[0]);
    for (size_t i = 1; i < threads.size(); ++i) {
        if (!met) {  // where the first meets nobody, none does
            threadIdx = threads[i].index;
            (*work)();
            continue;
        }
        start(threads[i]);
        go_on(threads[i]);
    }
    while (met && step()) {
    }
}

static void every_block(const unsigned *grid, const unsigned *block, const std::function<void()> &f) {
    threads.resize(block[0] * block[1] * block[2]);
    for (unsigned i = 0; i < threads.size(); ++i) {
        threads[i].index = make_uint3(i % block[0], i / block[0] % block[1], i / block[0] / block[1]);
        threads[i].number = i;
    }
    work = &f;
    for (unsigned z = 0; z < grid[2]; ++z)
        for (unsigned y = 0; y < grid[1]; ++y)
            for (unsigned x = 0; x < grid[0]; ++x) {
                blockIdx = make_uint3(x, y, z);
                one_block();
            }
}

template <class... A, size_t... I>
void call(void (*kernel)(A...), void **arguments, std::index_sequence<I...>) {
    kernel(*static_cast<A *>(arguments[I])...);
}

template <class... A>
void launch(void (*kernel)(A...), const unsigned *grid, const unsigned *block, void **arguments) {
    every_block(grid, block, [=] { call(kernel, arguments, std::index_sequence_for<A...>()); });
}

template <class... A>
constexpr int count(void (*)(A...)) {
    return sizeof...(A);
}

}  // namespace host

static inline void __syncthreads() { host::wait(false); }

static inline unsigned __activemask() {
    unsigned found = 0, first = host::current->number / host::WARP * host::WARP;
    for (unsigned i = 0; i < host::WARP && first + i < host::threads.size(); ++i)
        if (!host::threads[first + i].done) found |= 1u << i;
    return found;
}

// Between lanes of a warp, or of parts of it of a width.
template <class T>
T __shfl(T value, int lane, int width = 32) {
    return host::from_lane(value, host::lane() / width * width + lane % width);
}
template <class T>
T __shfl_down(T value, unsigned delta, int width = 32) {
    unsigned mine = host::lane(), inside = mine % width + delta;
    return host::from_lane(value, inside < unsigned(width) ? mine + delta : mine);
}
template <class T>
T __shfl_up(T value, unsigned delta, int width = 32) {
    unsigned mine = host::lane();
    return host::from_lane(value, mine % width < delta ? mine : mine - delta);
}
template <class T>
T __shfl_xor(T value, int mask, int width = 32) {
    unsigned mine = host::lane(), other = mine ^ mask;
    return host::from_lane(value, other / width == mine / width ? other : mine);
}
template <class T>
T __shfl_sync(unsigned, T value, int lane, int width = 32) {
    return __shfl(value, lane, width);
}
template <class T>
T __shfl_down_sync(unsigned, T value, unsigned delta, int width = 32) {
    return __shfl_down(value, delta, width);
}
template <class T>
T __shfl_up_sync(unsigned, T value, unsigned delta, int width = 32) {
    return __shfl_up(value, delta, width);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask, int width = 32) {
    return __shfl_xor(value, mask, width);
}

namespace nvcuda {
namespace wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major };
namespace precision {
struct tf32;
}

// How many numbers of a fragment a thread has, by the terms of a product.
template <class Use, int terms>
constexpr int share = 8;
template <int terms>
constexpr int share<matrix_a, terms> = terms;
template <int terms>
constexpr int share<matrix_b, terms> = 8 * terms;

template <class Use, int m, int n, int k, class T, class Layout = void>
struct fragment {
    static_assert(m == 16 && n == 16);
    static constexpr int num_elements = share<Use, k>;
    float x[num_elements];
};

static inline int lane_row() { return threadIdx.x % 32 / 2; }
static inline int lane_column() { return threadIdx.x % 2 * 8; }

template <int k, class T, class Stored>
void load_matrix_sync(fragment<matrix_a, 16, 16, k, T, col_major> &into, const Stored *from, unsigned stride) {
    for (int q = 0; q < k; ++q) into.x[q] = static_cast<float>(from[q * stride + lane_row()]);
}

template <int k, class T, class Stored>
void load_matrix_sync(fragment<matrix_a, 16, 16, k, T, row_major> &into, const Stored *from, unsigned stride) {
    for (int q = 0; q < k; ++q) into.x[q] = static_cast<float>(from[lane_row() * stride + q]);
}

template <int k, class T, class Stored>
void load_matrix_sync(fragment<matrix_b, 16, 16, k, T, row_major> &into, const Stored *from, unsigned stride) {
    for (int q = 0; q < k; ++q)
        for (int v = 0; v < 8; ++v) into.x[q * 8 + v] = static_cast<float>(from[q * stride + lane_column() + v]);
}

// Tensor cores do not look at the last bits of float32.
template <class T>
float seen(float x) {
    return x;
}
template <>
inline float seen<precision::tf32>(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    bits &= ~0x1fffu;
    std::memcpy(&x, &bits, sizeof bits);
    return x;
}

static inline float __float_to_tf32(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    bits += 0x1000u;
    std::memcpy(&x, &bits, sizeof bits);
    return seen<precision::tf32>(x);
}

template <class A, class B, class T, class Layout, int k>
void multiply(float *sums, const fragment<A, 16, 16, k, T, Layout> &a, const fragment<B, 16, 16, k, T, row_major> &b) {
    for (int q = 0; q < k; ++q)
        for (int v = 0; v < 8; ++v) sums[v] += seen<T>(a.x[q]) * seen<T>(b.x[q * 8 + v]);
}

template <class Sums, class A, class B>
void mma_sync(Sums &into, const A &a, const B &b, const Sums &sums) {
    into = sums;
    multiply(into.x, a, b);
}

template <int k>
void store_matrix_sync(float *to, const fragment<accumulator, 16, 16, k, float> &from, unsigned stride, layout_t) {
    for (int v = 0; v < 8; ++v) to[lane_row() * stride + lane_column() + v] = from.x[v];
}

}  // namespace wmma
}  // namespace nvcuda

#define KERNEL(name)                                                                                   \
    extern "C" void run_##name(const unsigned *grid, const unsigned *block, void **arguments) {        \
        host::launch(name, grid, block, arguments);                                                    \
    }                                                                                                  \
    extern "C" int count_##name() { return host::count(name); }
#endif
