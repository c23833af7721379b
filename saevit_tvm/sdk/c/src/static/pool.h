/* A few threads that wait for shares of work: spinning first, because the next kernel is near, then asleep. */
#ifndef SAEVIT_POOL_H
#define SAEVIT_POOL_H

#include <pthread.h>
#include <stdatomic.h>

#include "../internal.h"

struct pool;

typedef struct {
    struct pool *pool;
    int index;
    pthread_t thread;
} pool_worker;

typedef struct pool {
    pthread_mutex_t lock;
    pthread_cond_t wake, done;
    atomic_uint round;
    atomic_int unfinished, failed;
    saevit_task task; /* NULL tells the workers to end */
    void *work;
    int worker_count;
    pool_worker *workers;
} pool;

/* Starts `count` workers in the given memory, beside whom the caller of saevit_pool_run works. */
HIDDEN int saevit_pool_start(pool *p, pool_worker *workers, int count);

/* A saevit_parallel: every worker and the caller take one share; `user` is the pool. */
HIDDEN int saevit_pool_run(saevit_task task, int count, void *work, void *user);

HIDDEN void saevit_pool_stop(pool *p);

#endif
