#define _POSIX_C_SOURCE 200809L /* clocks */

#include "batcher.h"

#include <string.h>
#include <time.h>

#include "copying.h"

enum {
    MOST_GATHERED = 8, /* callers: more are not back soon enough */
    FIRST_PAUSE = 32,
    LONGEST_PAUSE = 1024,
    UPLOAD = 1 << 20 /* bytes that are sent off while the next ones are copied */
};

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

/* The index of the smallest size that holds so many rows; `count` where none does. */
static size_t holding(const struct route *route, size_t rows) {
    size_t index = 0;
    while (index < route->count && route->sizes[index] < rows)
        index++;
    return index;
}

static void *graph_for(struct batcher *self, const struct slot *slot, size_t number, size_t rows) {
    size_t index = holding(&self->routes[number], rows);
    return index < self->routes[number].count ? slot->graphs[number][index] : NULL;
}

static void wish_for(struct batcher *self, enum wish_kind kind, size_t route, size_t rows) {
    self->wanted = (struct wish){route, holding(&self->routes[route], rows), kind};
    atomic_fetch_add(&self->wants, 1);
}

/* ---- places in batches; all of it with the lock */

/* A batch that gathers has room for all rows there are; others for half of them, but no less than a full size. */
static int has_room(struct batcher *self, struct slot *slot, size_t rows) {
    struct route *route = &self->routes[slot->route];
    size_t share = holding(route, slot->gathers ? route->rows_inside : (route->rows_inside + 1) / 2);
    size_t most = route->sizes[share < route->count ? share : route->count - 1];
    if (slot->rows + rows > most)
        return 0;
    if (graph_for(self, slot, slot->route, slot->rows + rows))
        return 1;
    wish_for(self, GRAPHS_UP_TO, slot->route, most);
    return 0;
}

static struct slot *open_batch(struct batcher *self, size_t number, size_t rows) {
    for (size_t index = 0; index < MOST_SLOTS; index++) {
        struct slot *slot = &self->slots[index], **link = &self->queue;
        if (slot->state != FREE || !graph_for(self, slot, number, rows))
            continue;
        slot->state = FILLING;
        slot->route = number;
        slot->rows = slot->company = slot->copying = slot->inside = 0;
        slot->status = slot->gathers = 0;
        slot->first = slot->last = NULL;
        slot->following = NULL;
        slot->uploaded_from = (size_t)-1;
        while (*link)
            link = &(*link)->following;
        *link = slot;
        self->routes[number].open = slot;
        return slot;
    }
    return NULL;
}

static void take_place(struct batcher *self, struct slot *slot, struct request *request) {
    request->slot = slot;
    request->first_row = slot->rows;
    request->uploads = slot->rows + request->rows > self->routes[slot->route].most_in_graph;
    if (request->uploads && slot->uploaded_from > slot->rows)
        slot->uploaded_from = slot->rows;
    request->next = NULL;
    if (slot->last)
        slot->last->next = request;
    else
        slot->first = request;
    slot->last = request;
    slot->rows += request->rows;
    slot->company++;
    slot->copying++;
    slot->inside++;
    sem_post(&request->woken);
}

/* Give places to those in the line, in their order: nobody overtakes another one of the same route. */
static void serve_line(struct batcher *self) {
    struct request **link = &self->line;
    self->pass++;
    while (*link) {
        struct request *request = *link;
        struct route *route = &self->routes[request->route];
        struct slot *slot = NULL;
        if (route->passed_over != self->pass) {
            slot = route->open && has_room(self, route->open, request->rows)
                       ? route->open
                       : open_batch(self, request->route, request->rows);
            if (!slot)
                route->passed_over = self->pass;
        }
        if (slot) {
            *link = request->next;
            take_place(self, slot, request);
        } else {
            link = &request->next;
        }
    }
}

/* ---- runs */

/* Whether this batch, whose turn has come, waits for callers that usually come; with the lock. */
static int is_to_gather(struct batcher *self, struct slot *slot) {
    if (self->patience_back || (double)self->waiting + 0.5 > self->usual || self->usual > MOST_GATHERED + 0.5 ||
        !self->is_lent || self->routes[slot->route].open != slot)
        return 0;
    double time = now();
    if (!slot->gathers) {
        double delay = self->run / 4;
        slot->gathers = slot->first->gathers = 1;
        slot->deadline = time + (delay < self->most_delay ? delay : self->most_delay);
        sem_post(&slot->first->woken);
        serve_line(self); /* there is more room now */
    }
    if (time < slot->deadline)
        return 1;
    self->pause = self->pause ? self->pause * 2 : FIRST_PAUSE;
    if (self->pause > LONGEST_PAUSE)
        self->pause = LONGEST_PAUSE;
    self->patience_back = self->pause;
    return 0;
}

/* The batch that is to be launched now, by whoever asked; with the lock. It takes no more rows once its turn has come. */
static struct slot *next_to_run(struct batcher *self) {
    struct slot *slot = self->queue;
    if (self->running || !slot || is_to_gather(self, slot))
        return NULL;
    if (self->routes[slot->route].open == slot)
        self->routes[slot->route].open = NULL;
    if (slot->gathers)
        pthread_cond_broadcast(&self->gathered);
    if (slot->copying)
        return NULL; /* the last one who copies asks again */
    self->queue = slot->following;
    self->running = slot;
    slot->state = RUNNING;
    self->waiting -= slot->company;
    self->usual *= 0.8;
    if ((double)self->inside > self->usual)
        self->usual = (double)self->inside;
    if (self->patience_back)
        self->patience_back--;
    else if (slot->gathers)
        self->pause = 0; /* all of them came */
    return slot;
}

/* Wait for others to join this batch; with the lock. */
static void gather(struct batcher *self, struct slot *slot) {
    struct timespec deadline;
    deadline.tv_sec = (time_t)slot->deadline;
    deadline.tv_nsec = (long)(1e9 * (slot->deadline - (double)deadline.tv_sec));
    while (self->is_lent && self->routes[slot->route].open == slot && now() < slot->deadline)
        pthread_cond_timedwait(&self->gathered, &self->lock, &deadline);
}

/* Padding repeats the last row, which is certain to be valid. */
static void pad(const struct batcher *self, const struct slot *slot, size_t size) {
    const struct route *route = &self->routes[slot->route];
    for (size_t tensor = 0; tensor < self->inputs; tensor++) {
        size_t bytes = route->row_bytes[tensor];
        char *last = slot->tensors[tensor] + (slot->rows - 1) * bytes;
        for (size_t row = slot->rows; row < size; row++)
            memcpy(last + (row - slot->rows + 1) * bytes, last, bytes);
    }
}

/* Send rows from pinned memory to the GPU; the driver's status. */
static int upload_rows(struct batcher *self, const struct slot *slot, size_t from, size_t until) {
    const struct route *route = &self->routes[slot->route];
    int status = 0;
    for (size_t tensor = 0; tensor < self->inputs && from < until && !status; tensor++) {
        size_t bytes = route->row_bytes[tensor];
        if (bytes)
            status = self->driver.upload(slot->inputs[tensor] + from * bytes, slot->tensors[tensor] + from * bytes,
                                         (until - from) * bytes, slot->stream);
    }
    return status;
}

static void launch(struct batcher *self, struct slot *slot) {
    struct route *route = &self->routes[slot->route];
    size_t index = holding(route, slot->rows), size = route->sizes[index];
    void *context;
    slot->launched = now();
    if (slot->status) /* a caller could not upload its rows */
        return;
    pad(self, slot, size);
    slot->status = self->driver.push(self->driver.context);
    if (slot->status)
        return;
    if (size > route->most_in_graph) { /* what was not uploaded yet: the first rows, and the padding */
        slot->status = upload_rows(self, slot, 0, slot->uploaded_from < slot->rows ? slot->uploaded_from : size);
        if (!slot->status && slot->uploaded_from < slot->rows)
            slot->status = upload_rows(self, slot, slot->rows, size);
    }
    if (!slot->status)
        slot->status = self->driver.launch(slot->graphs[slot->route][index], slot->stream);
    self->driver.pop(&context);
    atomic_fetch_add(&route->runs[index], 1);
}

/* Launch a batch whose callers all sleep, and let one of them wait for the GPU. */
static void launch_for_others(struct batcher *self, struct slot *slot) {
    launch(self, slot);
    slot->first->waits_for_gpu = 1;
    sem_post(&slot->first->woken);
}

/* Wait for the run, launch the next one, and wake the callers. */
static void finish(struct batcher *self, struct slot *slot, struct request *own) {
    void *context;
    if (!self->driver.push(self->driver.context)) {
        int status = self->driver.synchronize(slot->stream);
        if (!slot->status)
            slot->status = status;
        if (slot->status) /* what was sent off must not read or write the memory any more when it is used again */
            self->driver.synchronize(slot->stream);
        self->driver.pop(&context);
    }
    double seconds = now() - slot->launched;
    pthread_mutex_lock(&self->lock);
    self->run = self->run > 0 && 1.2 * self->run < seconds ? 1.2 * self->run : seconds; /* a short one, of late */
    slot->state = EMPTYING;
    self->running = NULL;
    struct slot *next = next_to_run(self);
    pthread_mutex_unlock(&self->lock);
    if (next)
        launch_for_others(self, next);
    size_t company = slot->company;
    for (struct request *request = slot->first, *following; request; request = following) {
        following = request->next; /* before it is woken, and gone */
        request->company = company;
        request->status = slot->status;
        request->outcome = slot->status ? FAILED : RAN;
        if (request != own)
            sem_post(&request->woken);
    }
}

/* ---- what a caller does */

static void wait_to_be_woken(struct request *request) {
    while (sem_wait(&request->woken)) { /* a signal came: Python sees to it afterwards */
    }
}

/* Copy rows of one input, and send them off as they come; the driver's status. */
static int copy_and_upload(struct batcher *self, struct slot *slot, size_t tensor, size_t offset, const char *from,
                           size_t bytes) {
    char *to = slot->tensors[tensor] + offset;
    struct copy copy = {to, from, bytes};
    struct copying job;
    int status = 0;
    if (bytes < COPIED_ALONE) {
        memcpy(to, from, bytes);
        return bytes ? self->driver.upload(slot->inputs[tensor] + offset, to, bytes, slot->stream) : 0;
    }
    copying_begin(&job, &copy, 1);
    for (size_t sent = 0; sent < bytes && !status;) {
        size_t arrived = copying_advance(&job, sent + UPLOAD);
        status = self->driver.upload(slot->inputs[tensor] + offset + sent, to + sent, arrived - sent, slot->stream);
        sent = arrived;
    }
    copying_end(&job);
    return status;
}

/* Copy a caller's rows to where its batch runs; the driver's status. */
static int copy_in(struct batcher *self, struct request *request) {
    const struct route *route = &self->routes[request->route];
    struct slot *slot = request->slot;
    void *context;
    int status = request->uploads ? self->driver.push(self->driver.context) : 0;
    if (status)
        return status;
    for (size_t tensor = 0; tensor < self->inputs && !status; tensor++) {
        size_t offset = request->first_row * route->row_bytes[tensor];
        size_t bytes = request->rows * route->row_bytes[tensor];
        if (request->uploads)
            status = copy_and_upload(self, slot, tensor, offset, request->tensors[tensor], bytes);
        else
            copy_bytes(slot->tensors[tensor] + offset, request->tensors[tensor], bytes);
    }
    if (request->uploads)
        self->driver.pop(&context);
    return status;
}

static void copy_out(struct batcher *self, struct request *request) {
    const struct route *route = &self->routes[request->route];
    for (size_t tensor = self->inputs; tensor < self->tensors; tensor++) {
        size_t bytes = route->row_bytes[tensor];
        copy_bytes(request->tensors[tensor], request->slot->tensors[tensor] + request->first_row * bytes,
                   request->rows * bytes);
    }
}

static int can_run(struct batcher *self, const struct request *request) {
    if (!self->is_lent)
        return 0;
    for (size_t index = 0; index < MOST_SLOTS; index++)
        if (self->slots[index].state != NOT_LENT &&
            graph_for(self, &self->slots[index], request->route, request->rows))
            return 1;
    wish_for(self, ONE_GRAPH, request->route, request->rows);
    return 0;
}

static size_t slots_lent(const struct batcher *self) {
    size_t count = 0;
    for (size_t index = 0; index < MOST_SLOTS; index++)
        count += self->slots[index].state != NOT_LENT;
    return count;
}

/* Stand in the line until there is a place in a batch; 0 where there is none to be had. */
static int find_place(struct batcher *self, struct request *request) {
    struct request **link = &self->line;
    pthread_mutex_lock(&self->lock);
    if (!can_run(self, request)) {
        pthread_mutex_unlock(&self->lock);
        return 0;
    }
    while (*link)
        link = &(*link)->next;
    *link = request;
    self->routes[request->route].rows_inside += request->rows;
    self->inside++;
    self->waiting++;
    serve_line(self);
    if (self->line && slots_lent(self) == 1)
        wish_for(self, ANOTHER_SLOT, self->line->route, self->line->rows);
    pthread_mutex_unlock(&self->lock);
    wait_to_be_woken(request);
    return request->slot != NULL;
}

/* Sleep until the batch has run; wait for others to join it, or for the GPU, where that is this caller's part. */
static void await_run(struct batcher *self, struct request *request) {
    struct slot *slot = request->slot;
    for (int gathers = 1; gathers;) {
        pthread_mutex_lock(&self->lock);
        struct slot *runs = next_to_run(self);
        pthread_mutex_unlock(&self->lock);
        if (runs == slot) {
            launch(self, slot);
            finish(self, slot, request);
            return;
        }
        if (runs)
            launch_for_others(self, runs);
        wait_to_be_woken(request);
        pthread_mutex_lock(&self->lock);
        gathers = request->gathers;
        request->gathers = 0;
        if (gathers)
            gather(self, slot);
        pthread_mutex_unlock(&self->lock);
    }
    if (request->waits_for_gpu)
        finish(self, slot, request);
}

static void run_in_place(struct batcher *self, struct request *request) {
    struct slot *slot = request->slot;
    int status = copy_in(self, request);
    pthread_mutex_lock(&self->lock);
    slot->copying--;
    if (status)
        slot->status = status;
    pthread_mutex_unlock(&self->lock);
    await_run(self, request);
    if (request->outcome == RAN)
        copy_out(self, request);
    pthread_mutex_lock(&self->lock);
    self->routes[request->route].rows_inside -= request->rows;
    self->inside--;
    if (--slot->inside == 0) {
        slot->state = FREE;
        serve_line(self);
        pthread_cond_broadcast(&self->emptied);
    }
    pthread_mutex_unlock(&self->lock);
}

void batcher_run(struct batcher *self, struct request *request) {
    request->outcome = AWAY;
    request->status = 0;
    request->slot = NULL;
    request->waits_for_gpu = request->gathers = 0;
    request->next = NULL;
    sem_init(&request->woken, 0, 0);
    if (find_place(self, request))
        run_in_place(self, request);
    sem_destroy(&request->woken);
}

struct wish batcher_wanted(struct batcher *self) {
    pthread_mutex_lock(&self->lock);
    struct wish wanted = self->wanted;
    pthread_mutex_unlock(&self->lock);
    return wanted;
}

size_t batcher_callers(struct batcher *self) {
    pthread_mutex_lock(&self->lock);
    size_t callers = self->inside;
    pthread_mutex_unlock(&self->lock);
    return callers;
}

/* ---- what Python does */

int batcher_init(struct batcher *self, struct driver driver, size_t inputs, size_t outputs, double most_delay) {
    memset(self, 0, sizeof *self);
    self->driver = driver;
    self->inputs = inputs;
    self->tensors = inputs + outputs;
    self->most_delay = most_delay;
    pthread_condattr_t monotonic;
    if (pthread_condattr_init(&monotonic))
        return -1;
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    int failed = pthread_mutex_init(&self->lock, NULL) || pthread_cond_init(&self->emptied, NULL) ||
                 pthread_cond_init(&self->gathered, &monotonic);
    pthread_condattr_destroy(&monotonic);
    return failed ? -1 : 0; /* on Linux they need no memory of their own, and do not fail */
}

void batcher_free(struct batcher *self) {
    pthread_cond_destroy(&self->gathered);
    pthread_cond_destroy(&self->emptied);
    pthread_mutex_destroy(&self->lock);
}

int batcher_add_route(struct batcher *self, const size_t *sizes, size_t count, const size_t *row_bytes,
                      size_t most_in_graph) {
    int number = -1;
    pthread_mutex_lock(&self->lock);
    if (self->route_count < MOST_ROUTES) {
        struct route *route = &self->routes[number = (int)self->route_count++];
        memcpy(route->sizes, sizes, count * sizeof *sizes);
        memcpy(route->row_bytes, row_bytes, self->tensors * sizeof *row_bytes);
        route->count = count;
        route->most_in_graph = most_in_graph;
    }
    pthread_mutex_unlock(&self->lock);
    return number;
}

void batcher_lend(struct batcher *self, size_t number, void *stream, char *const *tensors,
                  const unsigned long long *inputs) {
    struct slot *slot = &self->slots[number];
    pthread_mutex_lock(&self->lock);
    slot->stream = stream;
    memcpy(slot->tensors, tensors, self->tensors * sizeof *tensors);
    memcpy(slot->inputs, inputs, self->inputs * sizeof *inputs);
    memset(slot->graphs, 0, sizeof slot->graphs);
    slot->state = FREE;
    pthread_mutex_unlock(&self->lock);
}

void batcher_set_graph(struct batcher *self, size_t slot, size_t route, size_t size, void *graph) {
    pthread_mutex_lock(&self->lock);
    self->slots[slot].graphs[route][size] = graph;
    pthread_mutex_unlock(&self->lock);
}

void batcher_open(struct batcher *self) {
    pthread_mutex_lock(&self->lock);
    self->is_lent = 1;
    pthread_mutex_unlock(&self->lock);
}

void batcher_recall(struct batcher *self) {
    pthread_mutex_lock(&self->lock);
    self->is_lent = 0;
    while (self->line) {
        struct request *request = self->line;
        self->line = request->next; /* before it is woken, and gone */
        self->routes[request->route].rows_inside -= request->rows;
        self->inside--;
        self->waiting--;
        sem_post(&request->woken);
    }
    pthread_cond_broadcast(&self->gathered);
    for (size_t index = 0; index < MOST_SLOTS; index++) {
        struct slot *slot = &self->slots[index];
        while (slot->state != NOT_LENT && slot->state != FREE)
            pthread_cond_wait(&self->emptied, &self->lock);
        slot->state = NOT_LENT;
    }
    pthread_mutex_unlock(&self->lock);
}
