/* The micro-batcher: requests of several callers run together, as one CUDA graph that uploads, computes, downloads.
 *
 * Every caller copies its own rows into the pinned memory of the batch that it joins, and its own results out of it. Rows
 * that make a batch large it sends to the GPU as well, as they are copied, while another batch runs: then the graph only
 * computes and downloads. One batch runs at a time. Whoever notices that a batch can run launches it, and one of its own callers waits for the GPU.
 * Nobody needs Python's interpreter lock for any of it.
 *
 * A few callers are back sooner than it would pay to run them in two batches: the GPU waits for them, a quarter of a run
 * at most. Many are not: they share themselves out evenly over two batches, one of which fills while the other one runs.
 *
 * The slots are Python's: they are lent, with their graphs, and called back when Python wants to use them itself.
 */
#ifndef BATCHER_H
#define BATCHER_H

#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stddef.h>

enum { MOST_SLOTS = 4, MOST_SIZES = 24, MOST_ROUTES = 64, MOST_TENSORS = 64 };

/* What is called of the CUDA driver, or of who stands in for it. 0 is success. */
struct driver {
    int (*push)(void *context);
    int (*pop)(void **context);
    int (*upload)(unsigned long long to, const void *from, size_t bytes, void *stream);
    int (*launch)(void *graph, void *stream);
    int (*synchronize)(void *stream);
    void *context;
};

enum outcome {
    RAN,
    AWAY,  /* the slots are not lent, or not for so many rows: Python has to run it */
    FAILED /* the whole batch, with the driver's `status` */
};

/* One caller's rows, on its stack until it is answered. */
struct request {
    size_t route, rows;
    char **tensors; /* its arrays: the inputs, then the outputs */
    enum outcome outcome;
    int status;
    size_t company; /* requests in its batch */
    /* What follows belongs to the batcher. */
    struct slot *slot;
    size_t first_row;
    int uploads;       /* it sends its rows to the GPU itself */
    int waits_for_gpu; /* it is the one of its batch that does */
    int gathers;       /* it is the one of its batch that waits for others to come */
    sem_t woken;
    struct request *next;
};

/* Rows of one kind: their bytes in each tensor, and the sizes that batches of them run in, the smallest first. */
struct route {
    size_t row_bytes[MOST_TENSORS], sizes[MOST_SIZES], count;
    size_t most_in_graph; /* rows that the graphs upload; those of larger sizes do not */
    atomic_size_t runs[MOST_SIZES];
    size_t rows_inside;   /* of all callers */
    struct slot *open;    /* whose batch still takes rows */
    unsigned passed_over; /* in which pass over the line somebody had to wait */
};

enum state { NOT_LENT, FREE, FILLING, RUNNING, EMPTYING };

/* Memory for one batch, and the batch in it. */
struct slot {
    void *stream, *graphs[MOST_ROUTES][MOST_SIZES];
    char *tensors[MOST_TENSORS];             /* pinned */
    unsigned long long inputs[MOST_TENSORS]; /* on the GPU */
    enum state state;
    size_t route, rows, company;
    int gathers; /* others are waited for, until `deadline` */
    double launched, deadline;
    size_t uploaded_from; /* the first row that its own caller uploads */
    size_t copying; /* callers who are not done copying their rows in */
    size_t inside;  /* callers who are not done copying their results out */
    int status;
    struct request *first, *last;
    struct slot *following; /* in the queue of batches that are to run */
};

/* What was missed: the graph of a route's size, by its index; those of all sizes up to it, for callers who would have
 * filled it together; or the same in a slot beside the only one. */
enum wish_kind { ONE_GRAPH, GRAPHS_UP_TO, ANOTHER_SLOT };

struct wish {
    size_t route, size;
    enum wish_kind kind;
};

struct batcher {
    struct driver driver;
    size_t inputs, tensors;
    pthread_mutex_t lock;
    pthread_cond_t emptied, gathered;
    struct slot slots[MOST_SLOTS];
    struct route routes[MOST_ROUTES];
    size_t route_count;
    int is_lent;
    struct slot *running, *queue;
    struct request *line; /* who waits for a place in a batch, first come first */
    unsigned pass;
    size_t inside, waiting; /* callers; and those of them who are not being run */
    double usual;           /* callers inside of late */
    double run;             /* seconds of a short run of late */
    double most_delay;      /* seconds */
    unsigned patience_back; /* after so many batches others are waited for again, since that was in vain */
    unsigned pause;         /* how many that were the last time */
    struct wish wanted;
    atomic_size_t wants; /* counts them */
};

int batcher_init(struct batcher *self, struct driver driver, size_t inputs, size_t outputs, double most_delay);
void batcher_free(struct batcher *self);

/* A new route's number; what it is made of, as the struct has it. -1: there are too many. */
int batcher_add_route(struct batcher *self, const size_t *sizes, size_t count, const size_t *row_bytes,
                      size_t most_in_graph);

/* Lend a slot: its stream, the pinned memory of each tensor, and that of the inputs on the GPU. Nothing of it may be used
 * until `batcher_recall`. */
void batcher_lend(struct batcher *self, size_t slot, void *stream, char *const *tensors,
                  const unsigned long long *inputs);

/* The graph of a lent slot for the size of that index. */
void batcher_set_graph(struct batcher *self, size_t slot, size_t route, size_t size, void *graph);

/* Let callers in. */
void batcher_open(struct batcher *self);

/* Let nobody in any more, wait for the batches there are, and give back all slots. */
void batcher_recall(struct batcher *self);

/* Run a request together with others; sets its outcome. The rows are at least one. */
void batcher_run(struct batcher *self, struct request *request);

/* What was missed last. */
struct wish batcher_wanted(struct batcher *self);

/* How many requests are here: in the line, or in a batch. */
size_t batcher_callers(struct batcher *self);

#endif
