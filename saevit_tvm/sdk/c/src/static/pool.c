#define _GNU_SOURCE
#include "pool.h"

#include <sched.h>

/* About a tenth of a millisecond: longer than the gap between two kernels, too short to warm the room. */
enum { SPINS = 4000, SPINS_TO_YIELD = 128 };

static void breathe(int spin) {
    if (spin % SPINS_TO_YIELD == SPINS_TO_YIELD - 1) sched_yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static unsigned next_round(pool *p, unsigned seen) {
    for (int spin = 0; spin < SPINS; spin++) {
        unsigned round = atomic_load_explicit(&p->round, memory_order_acquire);
        if (round != seen) return round;
        breathe(spin);
    }
    pthread_mutex_lock(&p->lock);
    while (atomic_load(&p->round) == seen) pthread_cond_wait(&p->wake, &p->lock);
    pthread_mutex_unlock(&p->lock);
    return atomic_load(&p->round);
}

static void *work(void *argument) {
    pool_worker *self = argument;
    pool *p = self->pool;
    unsigned seen = 0;
    for (;;) {
        seen = next_round(p, seen);
        if (!p->task) return NULL;
        if (p->task(self->index, p->worker_count + 1, p->work)) atomic_store(&p->failed, 1);
        if (atomic_fetch_sub(&p->unfinished, 1) == 1) {
            pthread_mutex_lock(&p->lock);
            pthread_cond_signal(&p->done);
            pthread_mutex_unlock(&p->lock);
        }
    }
}

static void begin_round(pool *p, saevit_task task, void *work_to_do) {
    p->task = task;
    p->work = work_to_do;
    atomic_store(&p->failed, 0);
    atomic_store(&p->unfinished, p->worker_count);
    pthread_mutex_lock(&p->lock);
    atomic_fetch_add(&p->round, 1);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);
}

static void end_round(pool *p) {
    for (int spin = 0; spin < SPINS; spin++) {
        if (!atomic_load_explicit(&p->unfinished, memory_order_acquire)) return;
        breathe(spin);
    }
    pthread_mutex_lock(&p->lock);
    while (atomic_load(&p->unfinished)) pthread_cond_wait(&p->done, &p->lock);
    pthread_mutex_unlock(&p->lock);
}

int saevit_pool_start(pool *p, pool_worker *workers, int count) {
    atomic_init(&p->round, 0);
    atomic_init(&p->unfinished, 0);
    atomic_init(&p->failed, 0);
    p->workers = workers;
    p->worker_count = count;
    if (pthread_mutex_init(&p->lock, NULL)) return 0;
    if (pthread_cond_init(&p->wake, NULL)) goto no_wake;
    if (pthread_cond_init(&p->done, NULL)) goto no_done;
    for (int i = 0; i < count; i++) {
        workers[i].pool = p;
        workers[i].index = i + 1;
        if (!saevit_start_thread(&workers[i].thread, work, &workers[i])) {
            p->worker_count = i;
            saevit_pool_stop(p);
            return 0;
        }
    }
    return 1;
no_done:
    pthread_cond_destroy(&p->wake);
no_wake:
    pthread_mutex_destroy(&p->lock);
    return 0;
}

int saevit_pool_run(saevit_task task, int count, void *work_to_do, void *user) {
    pool *p = user;
    if (!p->worker_count) return task(0, count, work_to_do);
    begin_round(p, task, work_to_do);
    int failed = task(0, count, work_to_do);
    end_round(p);
    return failed ? failed : atomic_load(&p->failed);
}

void saevit_pool_stop(pool *p) {
    begin_round(p, NULL, NULL);
    for (int i = 0; i < p->worker_count; i++) pthread_join(p->workers[i].thread, NULL);
    pthread_cond_destroy(&p->done);
    pthread_cond_destroy(&p->wake);
    pthread_mutex_destroy(&p->lock);
}
