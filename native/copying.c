#define _POSIX_C_SOURCE 200809L /* signals */

#include "copying.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MOST_HELPERS = 7, BLOCK = 1 << 18, SPINS = 4000 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wanted = PTHREAD_COND_INITIALIZER;
static struct copying *first; /* of those with blocks that nobody has taken */
static size_t helpers, idle;  /* threads that were started, which stay; and those of them that sleep */

static size_t smaller(size_t one, size_t other) {
    return one < other ? one : other;
}

/* For another thread, which is at work and takes microseconds: waking up from sleep would take longer. */
static void spin(unsigned *rounds) {
    if (++*rounds > SPINS)
        sched_yield();
}

/* Take the next block and copy it; whether there was one. */
static int copy_block(struct copying *job) {
    size_t index = atomic_load(&job->next);
    if (index < job->count)
        index = atomic_fetch_add(&job->next, 1);
    if (index >= job->count)
        return 0;
    struct block *block = &job->blocks[index];
    memcpy(block->to, block->from, block->bytes);
    atomic_store_explicit(&block->is_done, 1, memory_order_release);
    return 1;
}

static void leave_list(const struct copying *job) {
    for (struct copying **link = &first; *link; link = &(*link)->following)
        if (*link == job) {
            *link = job->following;
            return;
        }
}

/* Wake one more thread, if another one is of use. Each wakes the next, so that the owner can begin; with the lock. */
static void call_one(const struct copying *job) {
    if (idle && atomic_load(&job->next) + 1 < job->count)
        pthread_cond_signal(&wanted);
}

static void *help(void *nothing) {
    pthread_mutex_lock(&lock);
    for (;;) {
        while (!first) {
            idle++;
            pthread_cond_wait(&wanted, &lock);
            idle--;
        }
        struct copying *job = first;
        atomic_fetch_add(&job->helpers, 1);
        call_one(job);
        pthread_mutex_unlock(&lock);
        while (copy_block(job)) {
        }
        pthread_mutex_lock(&lock);
        leave_list(job);
        atomic_fetch_sub(&job->helpers, 1); /* from here on its owner may free it */
    }
    return nothing;
}

/* Those that the system does not give are done without; with the lock. */
static void start_helpers(void) {
    long processors = sysconf(_SC_NPROCESSORS_ONLN);
    size_t most = smaller(processors > 1 ? (size_t)processors - 1 : 0, MOST_HELPERS);
    if (helpers >= most)
        return;
    sigset_t all, before;
    pthread_attr_t detached;
    pthread_t thread;
    sigfillset(&all); /* signals are for the program's own threads */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    while (helpers < most && pthread_create(&thread, &detached, help, NULL) == 0)
        helpers++;
    pthread_attr_destroy(&detached);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

void copying_begin(struct copying *job, const struct copy *copies, size_t count) {
    size_t blocks = 0;
    memset(job, 0, sizeof *job);
    for (size_t index = 0; index < count; index++) {
        blocks += (copies[index].bytes + BLOCK - 1) / BLOCK;
        job->bytes += copies[index].bytes;
    }
    job->blocks = calloc(blocks ? blocks : 1, sizeof *job->blocks);
    if (!job->blocks) {
        for (size_t index = 0; index < count; index++)
            memcpy(copies[index].to, copies[index].from, copies[index].bytes);
        job->front_bytes = job->bytes;
        return;
    }
    for (size_t index = 0; index < count; index++)
        for (size_t start = 0; start < copies[index].bytes; start += BLOCK) {
            struct block *block = &job->blocks[job->count++];
            block->to = copies[index].to + start;
            block->from = copies[index].from + start;
            block->bytes = smaller(BLOCK, copies[index].bytes - start);
        }
    if (job->count < 2)
        return;
    pthread_mutex_lock(&lock);
    struct copying **link = &first;
    while (*link)
        link = &(*link)->following;
    *link = job;
    start_helpers();
    call_one(job);
    pthread_mutex_unlock(&lock);
}

size_t copying_advance(struct copying *job, size_t bytes) {
    unsigned rounds = 0;
    bytes = smaller(bytes, job->bytes);
    for (;;) {
        while (job->front < job->count &&
               atomic_load_explicit(&job->blocks[job->front].is_done, memory_order_acquire)) {
            job->front_bytes += job->blocks[job->front++].bytes;
            rounds = 0;
        }
        if (job->front_bytes >= bytes)
            return job->front_bytes;
        if (!copy_block(job))
            spin(&rounds);
    }
}

void copying_end(struct copying *job) {
    unsigned rounds = 0;
    atomic_store(&job->next, job->count);
    pthread_mutex_lock(&lock);
    leave_list(job);
    pthread_mutex_unlock(&lock);
    while (atomic_load(&job->helpers))
        spin(&rounds);
    free(job->blocks);
}

void copy_bytes(char *to, const char *from, size_t bytes) {
    if (bytes < COPIED_ALONE) {
        memcpy(to, from, bytes);
        return;
    }
    struct copy copy = {to, from, bytes};
    struct copying job;
    copying_begin(&job, &copy, 1);
    copying_advance(&job, bytes);
    copying_end(&job);
}

void copying_after_fork(void) {
    pthread_mutex_init(&lock, NULL);
    pthread_cond_init(&wanted, NULL);
    first = NULL;
    helpers = idle = 0;
}
