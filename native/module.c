/* mlflow_trt._native: see mlflow_trt/_native.pyi for what it is to Python. */
#include "module.h"

#include "copying.h"

void *address_of(PyObject *number) {
    return PyLong_AsVoidPtr(number);
}

size_t size_of(PyObject *number) {
    return PyLong_AsSize_t(number);
}

/* As https://numpy.org/doc/stable/reference/arrays.interface.html describes it, so that numpy's headers are not needed:
 * their ABI is not the stable one. */
struct array_interface {
    int two, dimensions;
    char kind;
    int element_bytes, flags;
    Py_intptr_t *shape, *strides;
    void *data;
    PyObject *description;
};

enum { IS_CONTIGUOUS = 0x1, IS_WRITABLE = 0x400 };

char *memory_of(PyObject *array, size_t bytes, int is_written) {
    PyObject *capsule = PyObject_GetAttrString(array, "__array_struct__");
    if (!capsule)
        return NULL;
    struct array_interface *found = PyCapsule_GetPointer(capsule, NULL);
    char *data = NULL;
    if (found && found->two == 2) {
        size_t has = (size_t)found->element_bytes;
        for (int axis = 0; axis < found->dimensions; axis++)
            has *= (size_t)found->shape[axis];
        if (has == bytes && found->flags & IS_CONTIGUOUS && (!is_written || found->flags & IS_WRITABLE))
            data = found->data;
    }
    Py_DECREF(capsule); /* the array, which is the caller's, keeps the memory */
    if (!data && !PyErr_Occurred())
        PyErr_Format(PyExc_ValueError, "expected a contiguous array of %zu bytes", bytes);
    return data;
}

static PyObject *after_fork(PyObject *module, PyObject *nothing) {
    (void)module, (void)nothing;
    copying_after_fork();
    Py_RETURN_NONE;
}

static int add_type(PyObject *module, const char *name, PyType_Spec *spec) {
    PyObject *type = PyType_FromSpec(spec);
    if (!type)
        return -1;
    if (PyModule_AddObject(module, name, type) < 0) {
        Py_DECREF(type);
        return -1;
    }
    return 0;
}

static int add_types(PyObject *module) {
    return add_type(module, "Batcher", &batcher_spec) || add_type(module, "Copying", &copying_spec) ? -1 : 0;
}

static PyMethodDef functions[] = {
    {"after_fork", after_fork, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)add_types},
    {0, NULL},
};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "mlflow_trt._native",
    .m_methods = functions,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__native(void);

PyMODINIT_FUNC PyInit__native(void) {
    return PyModuleDef_Init(&definition);
}
