/* What the parts of the extension module share. Only Python's limited API: one build serves all versions from 3.10. */
#ifndef MODULE_H
#define MODULE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

/* The address in an int of Python's; NULL with an exception set where it is none. */
void *address_of(PyObject *number);

/* A count in an int of Python's; (size_t)-1 with an exception set where it is none. */
size_t size_of(PyObject *number);

/* Where the elements of a contiguous array lie, which are so many bytes; NULL with an exception set for anything else. */
char *memory_of(PyObject *array, size_t bytes, int is_written);

extern PyType_Spec batcher_spec, copying_spec;

#endif
