#include "copying.h"

#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

enum { BLOCK = 1 << 19, OWNER = MOST_COPYING_THREADS - 1 };

static const size_t NOTHING = SIZE_MAX;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wanted = PTHREAD_COND_INITIALIZER;
static struct copying *first; /* of those with blocks that nobody has taken */
static size_t helpers;        /* threads that were started; they stay */

static size_t smaller(size_t one, size_t other) {
    return one < other ? one : other;
}

/* Go over the next bytes, up to a block, and copy them unless `moves` is false; the place after them. */
static struct place pass(const struct copying *job, struct place at, int moves) {
    size_t left = BLOCK;
    while (left && at.index < job->count) {
        const struct copy *copy = &job->copies[at.index];
        size_t bytes = smaller(left, copy->bytes - at.offset);
        if (moves && bytes)
            memcpy(copy->to + at.offset, copy->from + at.offset, bytes);
        left -= bytes;
        at.before += bytes;
        at.offset += bytes;
        if (at.offset == copy->bytes) {
            at.index++;
            at.offset = 0;
        }
    }
    return at;
}

static int is_taken(const struct copying *job) {
    return job->next.index == job->count;
}

/* The bytes that have arrived, without a gap. */
static size_t arrived(const struct copying *job) {
    size_t bytes = job->next.before;
    for (size_t thread = 0; thread < MOST_COPYING_THREADS; thread++)
        bytes = smaller(bytes, job->in_work[thread]);
    return bytes;
}

static void leave_list(const struct copying *job) {
    for (struct copying **link = &first; *link; link = &(*link)->following)
        if (*link == job) {
            *link = job->following;
            return;
        }
}

/* Take a block and copy it, without the lock meanwhile. */
static void work(struct copying *job, size_t thread) {
    struct place start = job->next;
    job->next = pass(job, start, 0);
    job->in_work[thread] = start.before;
    if (is_taken(job))
        leave_list(job);
    pthread_mutex_unlock(&lock);
    pass(job, start, 1);
    pthread_mutex_lock(&lock);
    job->in_work[thread] = NOTHING;
    pthread_cond_signal(&job->changed); /* the owner may go on, and free the job once the lock is let go */
}

static void *help(void *argument) {
    size_t thread = (size_t)(uintptr_t)argument;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (!first)
            pthread_cond_wait(&wanted, &lock);
        work(first, thread);
    }
    return NULL;
}

/* Threads to share `blocks` with. Those that the system does not give are done without. */
static void find_help(size_t blocks) {
    long processors = sysconf(_SC_NPROCESSORS_ONLN);
    size_t most = smaller(processors > 1 ? (size_t)processors - 1 : 0, OWNER);
    if (helpers < most) {
        sigset_t all, before;
        pthread_attr_t detached;
        sigfillset(&all); /* signals are for the program's own threads */
        pthread_sigmask(SIG_SETMASK, &all, &before);
        pthread_attr_init(&detached);
        pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
        pthread_t thread;
        while (helpers < most && pthread_create(&thread, &detached, help, (void *)(uintptr_t)helpers) == 0)
            helpers++;
        pthread_attr_destroy(&detached);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
    }
    for (size_t woken = 0; woken + 1 < blocks && woken < helpers; woken++)
        pthread_cond_signal(&wanted);
}

void copying_begin(struct copying *job, const struct copy *copies, size_t count) {
    memset(job, 0, sizeof *job);
    job->copies = copies;
    job->count = count;
    for (size_t thread = 0; thread < MOST_COPYING_THREADS; thread++)
        job->in_work[thread] = NOTHING;
    for (size_t index = 0; index < count; index++)
        job->bytes += copies[index].bytes;
    pthread_cond_init(&job->changed, NULL);
    pthread_mutex_lock(&lock);
    if (!is_taken(job)) {
        struct copying **link = &first;
        while (*link)
            link = &(*link)->following;
        *link = job;
        find_help((job->bytes + BLOCK - 1) / BLOCK);
    }
    pthread_mutex_unlock(&lock);
}

size_t copying_advance(struct copying *job, size_t bytes) {
    pthread_mutex_lock(&lock);
    bytes = smaller(bytes, job->bytes);
    while (arrived(job) < bytes) {
        if (is_taken(job))
            pthread_cond_wait(&job->changed, &lock);
        else
            work(job, OWNER);
    }
    bytes = arrived(job);
    pthread_mutex_unlock(&lock);
    return bytes;
}

void copying_end(struct copying *job) {
    pthread_mutex_lock(&lock);
    leave_list(job);
    job->next.index = job->count;
    job->next.before = job->bytes;
    while (arrived(job) < job->bytes)
        pthread_cond_wait(&job->changed, &lock);
    pthread_mutex_unlock(&lock);
    pthread_cond_destroy(&job->changed);
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
    helpers = 0;
}
