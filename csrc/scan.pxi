# What the tokenizer and the prompt encoder use of trie.h and of CPython's strings.
from libc.stdint cimport int32_t

cdef extern from "trie.h":
    ctypedef struct Trie:
        pass
    ctypedef struct Scan:
        Py_ssize_t start
        Py_ssize_t end
    ctypedef enum ScanEvent:
        SCAN_END
        SCAN_UNKNOWN
        SCAN_SPECIAL
        SCAN_UNCLOSED
    enum:
        TRIE_PLAIN
        TRIE_SPECIAL
    const char *TRIE_CAPSULE
    Trie *trie_new(size_t count)
    void trie_free(Trie *trie)
    bint trie_insert(Trie *trie, int root, int kind, const void *text, Py_ssize_t length, int32_t token)
    void scan_begin(Scan *scan, const Trie *trie, object text)
    ScanEvent scan_tokens(Scan *scan, int32_t *ids, Py_ssize_t *count)
    int32_t scan_group(const Trie *trie, object token)

cdef extern from *:
    int PyUnicode_KIND(object text)
    void *PyUnicode_DATA(object text)
    Py_ssize_t PyUnicode_GET_LENGTH(object text)
    str PyUnicode_Substring(object text, Py_ssize_t start, Py_ssize_t end)


cdef inline str scanned_piece(str text, const Scan *scan, ScanEvent event):
    """The unknown run or special token that a scan stopped at."""
    cdef str piece = PyUnicode_Substring(text, scan.start, scan.end)
    return piece.replace("<<", "<") if event == SCAN_UNKNOWN else piece
