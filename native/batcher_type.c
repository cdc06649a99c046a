/* The class Batcher of the extension module. */
#include "module.h"

#include <stdlib.h>
#include <string.h>

#include "batcher.h"

typedef struct {
    PyObject_HEAD
    struct batcher *batcher;
} Batcher;

static struct batcher *of(PyObject *self) {
    return ((Batcher *)self)->batcher;
}

static PyObject *batcher_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    struct driver driver;
    Py_ssize_t inputs, outputs;
    double most_delay;
    PyObject *push, *pop, *upload, *launch, *synchronize, *context;
    if (keywords && PyDict_Size(keywords)) {
        PyErr_SetString(PyExc_TypeError, "Batcher takes no keywords");
        return NULL;
    }
    if (!PyArg_ParseTuple(arguments, "nndOOOOOO:Batcher", &inputs, &outputs, &most_delay, &push, &pop, &upload, &launch, &synchronize,
                          &context))
        return NULL;
    if (inputs < 1 || outputs < 1 || inputs + outputs > MOST_TENSORS) {
        PyErr_Format(PyExc_ValueError, "expected inputs and outputs, %d in all at most", MOST_TENSORS);
        return NULL;
    }
    driver.push = (int (*)(void *))address_of(push);
    driver.pop = (int (*)(void **))address_of(pop);
    driver.upload = (int (*)(unsigned long long, const void *, size_t, void *))address_of(upload);
    driver.launch = (int (*)(void *, void *))address_of(launch);
    driver.synchronize = (int (*)(void *))address_of(synchronize);
    driver.context = address_of(context);
    if (PyErr_Occurred())
        return NULL;
    struct batcher *batcher = malloc(sizeof *batcher);
    if (!batcher)
        return PyErr_NoMemory();
    if (batcher_init(batcher, driver, (size_t)inputs, (size_t)outputs, most_delay)) {
        free(batcher);
        return PyErr_NoMemory();
    }
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Batcher *self = (Batcher *)allocate(type, 0);
    if (!self) {
        batcher_free(batcher);
        free(batcher);
        return NULL;
    }
    self->batcher = batcher;
    return (PyObject *)self;
}

/* Nobody runs anything here any more: who does refers to it. */
static void batcher_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    batcher_free(of(self));
    free(of(self));
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

/* The counts in a tuple, at most so many; returns how many, or -1 with an exception set. */
static Py_ssize_t read_sizes(PyObject *numbers, size_t *into, Py_ssize_t most) {
    Py_ssize_t count = PyTuple_Size(numbers);
    if (count < 0 || count > most) {
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_ValueError, "expected %zd numbers at most", most);
        return -1;
    }
    for (Py_ssize_t index = 0; index < count; index++) {
        into[index] = size_of(PyTuple_GetItem(numbers, index));
        if (PyErr_Occurred())
            return -1;
    }
    return count;
}

static PyObject *add_route(PyObject *self, PyObject *arguments) {
    PyObject *sizes, *row_bytes;
    size_t size_list[MOST_SIZES], bytes_list[MOST_TENSORS];
    Py_ssize_t most_in_graph;
    if (!PyArg_ParseTuple(arguments, "O!O!n:add_route", &PyTuple_Type, &sizes, &PyTuple_Type, &row_bytes,
                          &most_in_graph))
        return NULL;
    Py_ssize_t count = read_sizes(sizes, size_list, MOST_SIZES);
    if (count < 0)
        return NULL;
    Py_ssize_t tensors = read_sizes(row_bytes, bytes_list, MOST_TENSORS);
    if (tensors < 0)
        return NULL;
    if (!count || (size_t)tensors != of(self)->tensors) {
        PyErr_SetString(PyExc_ValueError, "expected sizes, and the bytes of a row in each tensor");
        return NULL;
    }
    int number = batcher_add_route(of(self), size_list, (size_t)count, bytes_list, (size_t)most_in_graph);
    if (number < 0) {
        PyErr_SetString(PyExc_ValueError, "there are too many routes");
        return NULL;
    }
    return PyLong_FromLong(number);
}

static int is_slot(Py_ssize_t number) {
    if (number >= 0 && number < MOST_SLOTS)
        return 1;
    PyErr_SetString(PyExc_ValueError, "there is no such slot");
    return 0;
}

static PyObject *lend(PyObject *self, PyObject *arguments) {
    Py_ssize_t number;
    PyObject *stream, *pinned, *on_gpu;
    char *tensors[MOST_TENSORS];
    unsigned long long inputs[MOST_TENSORS];
    if (!PyArg_ParseTuple(arguments, "nOO!O!:lend", &number, &stream, &PyTuple_Type, &pinned, &PyTuple_Type, &on_gpu) ||
        !is_slot(number))
        return NULL;
    if ((size_t)PyTuple_Size(pinned) != of(self)->tensors || (size_t)PyTuple_Size(on_gpu) != of(self)->inputs) {
        PyErr_SetString(PyExc_ValueError, "expected the address of each tensor, and of each input on the GPU");
        return NULL;
    }
    for (size_t index = 0; index < of(self)->tensors; index++)
        tensors[index] = address_of(PyTuple_GetItem(pinned, (Py_ssize_t)index));
    for (size_t index = 0; index < of(self)->inputs; index++)
        inputs[index] = PyLong_AsUnsignedLongLong(PyTuple_GetItem(on_gpu, (Py_ssize_t)index));
    void *handle = address_of(stream);
    if (PyErr_Occurred())
        return NULL;
    batcher_lend(of(self), (size_t)number, handle, tensors, inputs);
    Py_RETURN_NONE;
}

static PyObject *set_graph(PyObject *self, PyObject *arguments) {
    Py_ssize_t slot, route, size;
    PyObject *graph;
    if (!PyArg_ParseTuple(arguments, "nnnO:set_graph", &slot, &route, &size, &graph) || !is_slot(slot))
        return NULL;
    if (route < 0 || route >= MOST_ROUTES || size < 0 || size >= MOST_SIZES) {
        PyErr_SetString(PyExc_ValueError, "there is no such route or size");
        return NULL;
    }
    void *handle = address_of(graph);
    if (PyErr_Occurred())
        return NULL;
    batcher_set_graph(of(self), (size_t)slot, (size_t)route, (size_t)size, handle);
    Py_RETURN_NONE;
}

static PyObject *open_to_callers(PyObject *self, PyObject *nothing) {
    (void)nothing;
    batcher_open(of(self));
    Py_RETURN_NONE;
}

static PyObject *recall(PyObject *self, PyObject *nothing) {
    (void)nothing;
    Py_BEGIN_ALLOW_THREADS
    batcher_recall(of(self));
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *run(PyObject *self, PyObject *const *arguments, Py_ssize_t count) {
    struct request request;
    char *tensors[MOST_TENSORS];
    if (count < 2 || (size_t)count - 2 != of(self)->tensors) {
        PyErr_SetString(PyExc_TypeError, "run takes a route, rows, and an array for each tensor");
        return NULL;
    }
    request.route = size_of(arguments[0]);
    request.rows = size_of(arguments[1]);
    if (PyErr_Occurred())
        return NULL;
    if (request.route >= of(self)->route_count || !request.rows) {
        PyErr_SetString(PyExc_ValueError, "there is no such route, or there are no rows");
        return NULL;
    }
    for (size_t index = 0; index < of(self)->tensors; index++) {
        size_t bytes = request.rows * of(self)->routes[request.route].row_bytes[index];
        tensors[index] = memory_of(arguments[index + 2], bytes, index >= of(self)->inputs);
        if (!tensors[index])
            return NULL;
    }
    request.tensors = tensors;
    Py_BEGIN_ALLOW_THREADS
    batcher_run(of(self), &request);
    Py_END_ALLOW_THREADS
    if (request.outcome == FAILED)
        return Py_BuildValue("(in)", request.status, (Py_ssize_t)request.company);
    return PyBool_FromLong(request.outcome == RAN);
}

static PyObject *runs(PyObject *self, PyObject *nothing) {
    (void)nothing;
    struct batcher *batcher = of(self);
    PyObject *found = PyList_New(0);
    for (size_t number = 0; found && number < batcher->route_count; number++) {
        struct route *route = &batcher->routes[number];
        for (size_t index = 0; found && index < route->count; index++) {
            PyObject *pair = Py_BuildValue("(nn)", (Py_ssize_t)route->sizes[index],
                                           (Py_ssize_t)atomic_load(&route->runs[index]));
            if (!pair || PyList_Append(found, pair))
                Py_CLEAR(found);
            Py_XDECREF(pair);
        }
    }
    return found;
}

static PyObject *wanted(PyObject *self, PyObject *nothing) {
    (void)nothing;
    struct wish wish = batcher_wanted(of(self));
    return Py_BuildValue("(nni)", (Py_ssize_t)wish.route, (Py_ssize_t)wish.size, (int)wish.kind);
}

static PyObject *get_wants(PyObject *self, void *nothing) {
    (void)nothing;
    return PyLong_FromSize_t(atomic_load(&of(self)->wants));
}

static PyObject *get_callers(PyObject *self, void *nothing) {
    (void)nothing;
    return PyLong_FromSize_t(batcher_callers(of(self)));
}

static PyMethodDef methods[] = {
    {"add_route", add_route, METH_VARARGS, NULL},
    {"lend", lend, METH_VARARGS, NULL},
    {"set_graph", set_graph, METH_VARARGS, NULL},
    {"open", open_to_callers, METH_NOARGS, NULL},
    {"recall", recall, METH_NOARGS, NULL},
    {"run", (PyCFunction)(void (*)(void))run, METH_FASTCALL, NULL},
    {"runs", runs, METH_NOARGS, NULL},
    {"wanted", wanted, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef attributes[] = {
    {"wants", get_wants, NULL, NULL, NULL},
    {"callers", get_callers, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot parts[] = {
    {Py_tp_new, (void *)batcher_new},     {Py_tp_dealloc, (void *)batcher_dealloc}, {Py_tp_methods, methods},
    {Py_tp_getset, attributes},           {0, NULL},
};

PyType_Spec batcher_spec = {
    .name = "mlflow_trt._native.Batcher",
    .basicsize = sizeof(Batcher),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = parts,
};
