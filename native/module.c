/* mlflow_trt._native: see mlflow_trt/_native.pyi for what it is to Python. */
#include "module.h"

#include "copying.h"

void *address_of(PyObject *number) {
    return PyLong_AsVoidPtr(number);
}

size_t size_of(PyObject *number) {
    return PyLong_AsSize_t(number);
}

static PyObject *after_fork(PyObject *module, PyObject *nothing) {
    (void)module, (void)nothing;
    copying_after_fork();
    Py_RETURN_NONE;
}

static int add_types(PyObject *module) {
    PyObject *copying = PyType_FromSpec(&copying_spec);
    if (!copying)
        return -1;
    if (PyModule_AddObject(module, "Copying", copying) < 0) {
        Py_DECREF(copying);
        return -1;
    }
    return 0;
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
