/* The vocabulary as a trie over code points, and the scan that cuts text into tokens along it.
 *
 * Nodes live in one open-addressing table keyed by (parent, character); a node's index in the table is its name, so a
 * step is one multiplication and usually one cache line. First characters have a table of their own, and a node says
 * whether it has children, so most words end without a failed look-up. Plain tokens and special tokens (`<...>`) hang
 * from two roots: plain text cannot reach a special token.
 */
#ifndef CPMBEE_TRIE_H
#define CPMBEE_TRIE_H

#include <Python.h>
#include <stdint.h>
#include <stdlib.h>

enum { TRIE_PLAIN = 0, TRIE_SPECIAL = 1, TRIE_NONE = 2, TRIE_RESERVED = 3 }; /* the roots, and "no such node" */
enum { TRIE_DIRECT = 1 << 16 };                                              /* first characters with a table */
static const char *const TRIE_CAPSULE = "cpmbee.Trie";

typedef struct {
    uint32_t parent; /* TRIE_NONE where the slot is empty */
    uint32_t character;
    int32_t token; /* id of the token that ends here, or -1 */
    uint32_t has_children;
} TrieNode;

typedef struct {
    uint32_t first[TRIE_DIRECT]; /* child of TRIE_PLAIN by character, or TRIE_NONE */
    uint32_t mask;
    int shift;
    size_t room; /* nodes that can still be added */
    TrieNode *nodes;
} Trie;

static inline void trie_free(Trie *trie) {
    if (trie != NULL) free(trie->nodes);
    free(trie);
}

/* An empty trie with room for `count` nodes, or NULL where memory is short. */
static inline Trie *trie_new(size_t count) {
    int bits = 4;
    while (((size_t)1 << bits) < count + count / 2 + TRIE_RESERVED) bits++;
    Trie *trie = (Trie *)malloc(sizeof(Trie));
    if (trie == NULL) return NULL;
    size_t slots = (size_t)1 << bits;
    trie->mask = (uint32_t)(slots - 1);
    trie->shift = 64 - bits;
    trie->room = count;
    trie->nodes = bits <= 31 ? (TrieNode *)malloc(slots * sizeof(TrieNode)) : NULL;
    if (trie->nodes == NULL) {
        trie_free(trie);
        return NULL;
    }
    for (size_t i = 0; i < slots; i++) trie->nodes[i] = (TrieNode){TRIE_NONE, 0, -1, 0};
    for (uint32_t i = 0; i < TRIE_RESERVED; i++) trie->nodes[i].parent = UINT32_MAX; /* taken, and never found */
    for (uint32_t i = 0; i < TRIE_DIRECT; i++) trie->first[i] = TRIE_NONE;
    return trie;
}

/* The slot of (parent, character), or the empty slot where it would go. */
static inline uint32_t trie_slot(const Trie *trie, uint32_t parent, uint32_t character) {
    uint64_t key = ((uint64_t)parent << 32 | character) * UINT64_C(0x9E3779B97F4A7C15);
    uint32_t slot = (uint32_t)(key >> trie->shift);
    for (;;) {
        const TrieNode *node = &trie->nodes[slot];
        if (node->parent == TRIE_NONE || (node->parent == parent && node->character == character)) return slot;
        slot = (slot + 1) & trie->mask;
    }
}

static inline uint32_t trie_child(const Trie *trie, uint32_t parent, uint32_t character) {
    uint32_t slot = trie_slot(trie, parent, character);
    return trie->nodes[slot].parent == TRIE_NONE ? (uint32_t)TRIE_NONE : slot;
}

static inline uint32_t trie_first(const Trie *trie, uint32_t character) {
    return character < TRIE_DIRECT ? trie->first[character] : trie_child(trie, TRIE_PLAIN, character);
}

/* Adds a token; returns 0 where the trie is full. */
static inline int trie_insert(Trie *trie, uint32_t root, int kind, const void *text, Py_ssize_t length, int32_t token) {
    uint32_t node = root;
    for (Py_ssize_t i = 0; i < length; i++) {
        uint32_t character = PyUnicode_READ(kind, text, i);
        uint32_t slot = trie_slot(trie, node, character);
        if (trie->nodes[slot].parent == TRIE_NONE) {
            if (trie->room == 0) return 0;
            trie->room--;
            trie->nodes[slot] = (TrieNode){node, character, -1, 0};
            trie->nodes[node].has_children = 1;
            if (node == TRIE_PLAIN && character < TRIE_DIRECT) trie->first[character] = slot;
        }
        node = slot;
    }
    trie->nodes[node].token = token;
    return 1;
}

typedef enum {
    SCAN_END,      /* the text is done */
    SCAN_UNKNOWN,  /* [start, end) fits no token (a `<` in it is still written `<<`) */
    SCAN_SPECIAL,  /* [start, end) is a special token that the vocabulary lacks */
    SCAN_UNCLOSED  /* the `<` at start opens a special token that does not close */
} ScanEvent;

typedef struct {
    const Trie *trie;
    const void *text;
    int kind;
    Py_ssize_t length;
    Py_ssize_t position; /* where the next call goes on */
    Py_ssize_t start, end;
} Scan;

/* One plain character: `<<` is one `<`; returns 0 at a `<` that opens a special token. */
#define SCAN_READ(kind, text, length, at, character, after)                                  \
    (character = PyUnicode_READ(kind, text, at), after = (at) + 1,                           \
     character != '<' || (after < (length) && PyUnicode_READ(kind, text, after++) == '<'))

/* The longest token at `position`, which does not open a special: its id or -1, and where it ends. */
static inline int32_t scan_longest(const Trie *trie, int kind, const void *text, Py_ssize_t length,
                                   Py_ssize_t position, Py_ssize_t *end) {
    uint32_t character;
    Py_ssize_t after;
    (void)SCAN_READ(kind, text, length, position, character, after);
    *end = after;
    uint32_t node = trie_first(trie, character);
    if (node == TRIE_NONE) return -1;
    int32_t longest = trie->nodes[node].token;
    position = after;
    while (trie->nodes[node].has_children && position < length) {
        if (!SCAN_READ(kind, text, length, position, character, after)) break;
        node = trie_child(trie, node, character);
        if (node == TRIE_NONE) break;
        position = after;
        if (trie->nodes[node].token >= 0) {
            longest = trie->nodes[node].token;
            *end = position;
        }
    }
    return longest;
}

/* Where the special token that opens at `start` ends, or -1. Its second character may be anything but `<`. */
static inline Py_ssize_t scan_closing(int kind, const void *text, Py_ssize_t length, Py_ssize_t start) {
    for (Py_ssize_t i = start + 2; i < length; i++) {
        uint32_t character = PyUnicode_READ(kind, text, i);
        if (character == '>') return i + 1;
        if (character == '<') return -1;
    }
    return -1;
}

static inline int32_t scan_special(const Trie *trie, int kind, const void *text, Py_ssize_t start, Py_ssize_t end) {
    uint32_t node = TRIE_SPECIAL;
    for (Py_ssize_t i = start; i < end; i++) {
        node = trie_child(trie, node, PyUnicode_READ(kind, text, i));
        if (node == TRIE_NONE) return -1;
    }
    return trie->nodes[node].token;
}

static inline ScanEvent scan_kind(Scan *scan, int kind, int32_t *ids, Py_ssize_t *count) {
    const Trie *trie = scan->trie;
    const void *text = scan->text;
    const Py_ssize_t length = scan->length;
    Py_ssize_t position = scan->position, unknown = -1, filled = *count; /* an unknown run starts at `unknown` */
    ScanEvent event = SCAN_END;
    while (position < length) {
        Py_ssize_t end;
        int32_t token;
        if (PyUnicode_READ(kind, text, position) == '<' &&
            (position + 1 == length || PyUnicode_READ(kind, text, position + 1) != '<')) {
            if (unknown >= 0) break;
            end = scan_closing(kind, text, length, position);
            token = end < 0 ? -1 : scan_special(trie, kind, text, position, end);
            if (token < 0) {
                event = end < 0 ? SCAN_UNCLOSED : SCAN_SPECIAL;
                scan->start = position;
                scan->end = position = end < 0 ? length : end;
                break;
            }
        } else {
            token = scan_longest(trie, kind, text, length, position, &end);
            if (token < 0) {
                if (unknown < 0) unknown = position;
                position = end;
                continue;
            }
            if (unknown >= 0) break;
        }
        ids[filled++] = token;
        position = end;
    }
    if (unknown >= 0) {
        event = SCAN_UNKNOWN;
        scan->start = unknown;
        scan->end = position;
    }
    scan->position = position;
    *count = filled;
    return event;
}

/* Appends ids to `ids` (room for one a character) and raises `*count`, up to what the caller must decide. */
static inline ScanEvent scan_tokens(Scan *scan, int32_t *ids, Py_ssize_t *count) {
    switch (scan->kind) { /* constants, so that each call is specialized */
        case PyUnicode_1BYTE_KIND: return scan_kind(scan, PyUnicode_1BYTE_KIND, ids, count);
        case PyUnicode_2BYTE_KIND: return scan_kind(scan, PyUnicode_2BYTE_KIND, ids, count);
        default: return scan_kind(scan, PyUnicode_4BYTE_KIND, ids, count);
    }
}

/* The id of `<name>` for the token `<name_suffix>` or `<name>`; -1 where there is none, or for other text. */
static inline int32_t scan_group(const Trie *trie, PyObject *token) {
    const void *text = PyUnicode_DATA(token);
    int kind = (int)PyUnicode_KIND(token);
    Py_ssize_t last = PyUnicode_GET_LENGTH(token) - 1;
    if (last < 1 || PyUnicode_READ(kind, text, 0) != '<' || PyUnicode_READ(kind, text, last) != '>') return -1;
    uint32_t node = TRIE_SPECIAL;
    for (Py_ssize_t i = 0; i < last && node != TRIE_NONE; i++) {
        uint32_t character = PyUnicode_READ(kind, text, i);
        if (character == '_') break;
        node = trie_child(trie, node, character);
    }
    if (node != TRIE_NONE) node = trie_child(trie, node, '>');
    return node == TRIE_NONE ? -1 : trie->nodes[node].token;
}

static inline void scan_begin(Scan *scan, const Trie *trie, PyObject *text) {
    scan->trie = trie;
    scan->text = PyUnicode_DATA(text);
    scan->kind = (int)PyUnicode_KIND(text);
    scan->length = PyUnicode_GET_LENGTH(text);
    scan->position = scan->start = scan->end = 0;
}

#endif
