/* The class Copying of the extension module. */
#include "module.h"

#include <stdlib.h>

#include "copying.h"

typedef struct {
    PyObject_HEAD
    struct copying job;
    struct copy *copies; /* NULL once it is closed */
} Copying;

static PyObject *copying_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    PyObject *numbers;
    if (keywords && PyDict_Size(keywords)) {
        PyErr_SetString(PyExc_TypeError, "Copying takes no keywords");
        return NULL;
    }
    if (!PyArg_ParseTuple(arguments, "O!:Copying", &PyList_Type, &numbers))
        return NULL;
    Py_ssize_t length = PyList_Size(numbers);
    if (length % 3) {
        PyErr_SetString(PyExc_ValueError, "expected the numbers of copies: to, from, bytes");
        return NULL;
    }
    struct copy *copies = calloc(length ? (size_t)length / 3 : 1, sizeof *copies);
    if (!copies)
        return PyErr_NoMemory();
    size_t count = 0;
    for (Py_ssize_t index = 0; index < length; index += 3) {
        struct copy copy = {
            address_of(PyList_GetItem(numbers, index)),
            address_of(PyList_GetItem(numbers, index + 1)),
            size_of(PyList_GetItem(numbers, index + 2)),
        };
        if (PyErr_Occurred()) {
            free(copies);
            return NULL;
        }
        if (copy.bytes)
            copies[count++] = copy;
    }
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Copying *self = (Copying *)allocate(type, 0);
    if (!self) {
        free(copies);
        return NULL;
    }
    self->copies = copies;
    copying_begin(&self->job, copies, count);
    return (PyObject *)self;
}

static void end(Copying *self) {
    struct copy *copies = self->copies;
    self->copies = NULL;
    if (!copies)
        return;
    Py_BEGIN_ALLOW_THREADS
    copying_end(&self->job);
    Py_END_ALLOW_THREADS
    free(copies);
}

static PyObject *copying_close(PyObject *self, PyObject *nothing) {
    (void)nothing;
    end((Copying *)self);
    Py_RETURN_NONE;
}

static PyObject *copying_go_on(PyObject *object, PyObject *argument) {
    Copying *self = (Copying *)object;
    size_t bytes = size_of(argument);
    if (PyErr_Occurred())
        return NULL;
    if (!self->copies) {
        PyErr_SetString(PyExc_ValueError, "the copies were closed");
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    bytes = copying_advance(&self->job, bytes);
    Py_END_ALLOW_THREADS
    return PyLong_FromSize_t(bytes);
}

static void copying_dealloc(PyObject *object) {
    PyTypeObject *type = Py_TYPE(object);
    end((Copying *)object);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

static PyMethodDef methods[] = {
    {"advance", copying_go_on, METH_O, NULL},
    {"close", copying_close, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot parts[] = {
    {Py_tp_new, (void *)copying_new},
    {Py_tp_dealloc, (void *)copying_dealloc},
    {Py_tp_methods, methods},
    {0, NULL},
};

PyType_Spec copying_spec = {
    .name = "mlflow_trt._native.Copying",
    .basicsize = sizeof(Copying),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = parts,
};
