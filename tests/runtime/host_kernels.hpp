// What comes before and after generated CUDA C++ so that this machine's compiler makes it a library of kernels that
// fake_cuda.c can launch: block by block, the threads of one as coroutines that meet at __syncthreads.
#ifndef HOST_KERNELS
#define HOST_KERNELS
#include <cuda_fp16.h>
#include <ucontext.h>
#include <vector_functions.h>

#include <algorithm>
#include <cmath>
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

static uint3 threadIdx, blockIdx;

namespace host {

struct Thread {
    ucontext_t context;
    uint3 index;
    bool done;
    std::vector<char> stack;
};

static ucontext_t scheduler;
static Thread *current;
static const std::function<void()> *work;
static bool met;  // some thread waited for others

static void begin() {
    (*work)();
    current->done = true;
}

static void start(Thread &thread) {
    thread.stack.resize(1 << 16);
    thread.done = false;
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

static void one_block(std::vector<Thread> &threads) {
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
    while (met && !threads[0].done)
        for (Thread &thread : threads) go_on(thread);
}

static void every_block(const unsigned *grid, const unsigned *block, const std::function<void()> &f) {
    static std::vector<Thread> threads;
    threads.resize(block[0] * block[1] * block[2]);
    for (unsigned i = 0; i < threads.size(); ++i)
        threads[i].index = make_uint3(i % block[0], i / block[0] % block[1], i / block[0] / block[1]);
    work = &f;
    for (unsigned z = 0; z < grid[2]; ++z)
        for (unsigned y = 0; y < grid[1]; ++y)
            for (unsigned x = 0; x < grid[0]; ++x) {
                blockIdx = make_uint3(x, y, z);
                one_block(threads);
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

static inline void __syncthreads() {
    host::met = true;
    swapcontext(&host::current->context, &host::scheduler);
}

#define KERNEL(name)                                                                                   \
    extern "C" void run_##name(const unsigned *grid, const unsigned *block, void **arguments) {        \
        host::launch(name, grid, block, arguments);                                                    \
    }                                                                                                  \
    extern "C" int count_##name() { return host::count(name); }
#endif
