# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""The tokenizer on a trie; `cpmbee.plain.tokenizer` says what it computes."""

cimport cython
from cpython.list cimport PyList_New, PyList_SET_ITEM
from cpython.long cimport PyLong_AsLongLongAndOverflow
from cpython.pycapsule cimport PyCapsule_Destructor, PyCapsule_GetPointer, PyCapsule_New
from cpython.ref cimport Py_INCREF
from libc.stdlib cimport free, malloc

from cpmbee.text_errors import not_initialized, unclosed_special, unknown_id
from cpmbee.token_input import exact_ext_table, exact_id, exact_text, exact_tokens, iterator_of
from cpmbee.vocabulary import check_vocabulary, is_special, read_vocabulary

include "scan.pxi"


cdef void free_trie_of(object capsule) noexcept:
    trie_free(<Trie *>PyCapsule_GetPointer(capsule, TRIE_CAPSULE))


cdef object make_trie(tuple tokens):
    """A capsule that owns the trie of the tokens."""
    cdef size_t room = 2 * len(tokens)
    cdef Trie *trie = filled_trie(tokens, room)
    while trie is NULL:  # nodes are where they are: a larger trie is filled anew
        room *= 2
        trie = filled_trie(tokens, room)
    try:
        return PyCapsule_New(trie, TRIE_CAPSULE, <PyCapsule_Destructor>free_trie_of)
    except:
        trie_free(trie)
        raise


cdef Trie *filled_trie(tuple tokens, size_t room) except? NULL:
    """NULL where they need more room."""
    cdef str token
    cdef int32_t token_id = 0
    cdef Trie *trie = trie_new(room)
    if trie is NULL:
        raise MemoryError("no memory for the vocabulary")
    for token in tokens:
        if not trie_insert(
            trie, TRIE_SPECIAL if is_special(token) else TRIE_PLAIN,
            PyUnicode_KIND(token), PyUnicode_DATA(token), PyUnicode_GET_LENGTH(token), token_id,
        ):
            trie_free(trie)
            return NULL
        token_id += 1
    return trie


@cython.no_gc  # it holds nothing that could hold it
cdef class Tokenizer:
    """Text to token ids and back.

    ``<...>`` in text is a special token, ``<<`` a literal ``<``; the rest is cut into vocabulary entries, always the
    longest that fits. Characters that fit nothing form unknown runs. An unknown run, and a special token that the
    vocabulary lacks, gets an id past the vocabulary, one per distinct text, listed in an ``ext_table``.

    Args:
        tokens: the vocabulary as its file spells it; the index is the id.

    Raises:
        VocabularyError: ``tokens`` is not a usable vocabulary.
    """

    cdef const Trie *trie  # NULL until __init__ has succeeded
    cdef dict ids
    cdef tuple known  # the tokens; newline and space as themselves
    cdef tuple decoded  # the tokens as text that can be encoded again
    cdef tuple numbers  # the ids as Python integers, so that encoding makes none
    cdef readonly tuple tokens
    cdef readonly object trie_capsule  # owns the trie, which cpmbee._prompt reads, too
    cdef readonly int vocab_size, pad_id, unk_id, mask_id, bos_id, eos_id, root_id, ans_id

    def __cinit__(self):
        self.tokens = ()

    def __init__(self, tokens):
        cdef tuple spelled = exact_tokens(tokens)
        cdef dict ids = check_vocabulary(spelled)
        cdef tuple known = tuple(ids)
        cdef object capsule = make_trie(known)
        cdef tuple decoded = tuple([t if is_special(t) else t.replace("<", "<<") for t in known])
        cdef tuple numbers = tuple(range(len(known)))
        cdef tuple named = tuple([ids[f"<{name}>"] for name in ("pad", "unk", "mask", "s", "/s", "root", "ans")])
        if self.trie is not NULL:  # asked here, where no other thread can come in between
            raise RuntimeError("a Tokenizer is built once")
        self.pad_id, self.unk_id, self.mask_id, self.bos_id, self.eos_id, self.root_id, self.ans_id = named
        self.ids, self.tokens, self.known, self.decoded, self.numbers = ids, spelled, known, decoded, numbers
        self.vocab_size = <int>len(known)
        self.trie_capsule = capsule
        self.trie = <const Trie *>PyCapsule_GetPointer(capsule, TRIE_CAPSULE)

    cdef int require_vocabulary(self) except -1:
        if self.trie is NULL:
            raise not_initialized("Tokenizer")
        return 0

    @classmethod
    def from_file(cls, path):
        """Read ``vocab.txt``.

        Raises:
            VocabularyError: the file is not a usable vocabulary; names the file and the line.
        """
        return cls(read_vocabulary(path))

    def encode(self, text, ext_table=None):
        """Cut ``text`` into tokens.

        Args:
            text: any string; lone surrogates count as unknown characters.
            ext_table: ids given out earlier, which keep their meaning; it is not modified.

        Returns:
            The ids, and the ext table with what this text added.

        Raises:
            TokenizeError: a ``<`` opens a special token that does not close; names the character offset. Or ``text`` is
                not a string, or ``ext_table`` not a dict of ids and texts.
        """
        self.require_vocabulary()
        cdef Scan scan
        cdef ScanEvent event
        cdef Py_ssize_t count = 0
        cdef str plain = text if type(text) is str else exact_text(text)
        cdef str piece
        cdef dict table = {} if ext_table is None else exact_ext_table(ext_table)
        cdef dict by_text = {known: ext_id for ext_id, known in table.items()}
        cdef int32_t *ids = <int32_t *>malloc((len(plain) + 1) * sizeof(int32_t))
        if ids is NULL:
            raise MemoryError("no memory for the tokens")
        try:
            scan_begin(&scan, self.trie, plain)
            while True:
                event = scan_tokens(&scan, ids, &count)
                if event == SCAN_END:
                    return self.as_list(ids, count), table
                if event == SCAN_UNCLOSED:
                    raise unclosed_special(scan.start)
                piece = scanned_piece(plain, &scan, event)
                ext_id = by_text.get(piece)
                if ext_id is None:
                    ext_id = self.vocab_size + len(table)
                    while ext_id in table:
                        ext_id += 1
                    table[ext_id] = piece
                    by_text[piece] = ext_id
                ids[count] = ext_id
                count += 1
        finally:
            free(ids)

    cdef list as_list(self, const int32_t *ids, Py_ssize_t count):
        cdef list result = PyList_New(count)
        cdef Py_ssize_t i
        cdef object number
        for i in range(count):
            number = self.numbers[ids[i]] if ids[i] < self.vocab_size else ids[i]
            Py_INCREF(number)
            PyList_SET_ITEM(result, i, number)
        return result

    def decode(self, ids, ext_table=None):
        """Join tokens to text in which a literal ``<`` is escaped, so that it can be encoded again.

        Args:
            ids: token ids.
            ext_table: texts that stand for ids, before the vocabulary's own.

        Raises:
            TokenizeError: an id is in neither; names it. Or ``ids`` are not integers, or ``ext_table`` not a dict of
                ids and texts.
        """
        self.require_vocabulary()
        cdef list pieces = []
        cdef dict table = None if ext_table is None else exact_ext_table(ext_table)
        cdef object token_id
        if type(ids) is not list:
            ids = iterator_of(ids)
        for token_id in ids:
            if type(token_id) is not int:
                token_id = exact_id(token_id)
            if table is not None and token_id in table:
                pieces.append(table[token_id])
            else:
                pieces.append(self.decoded[self.index_of(token_id)])
        return "".join(pieces)

    @cython.final
    cdef inline Py_ssize_t index_of(self, object token_id) except -1:
        """Where an id points among the tokens."""
        cdef int overflow = 0
        cdef long long index = PyLong_AsLongLongAndOverflow(token_id, &overflow)
        if overflow or not 0 <= index < self.vocab_size:
            raise unknown_id(token_id, self.vocab_size)
        return <Py_ssize_t>index

    @staticmethod
    def escape(text):
        """Make ``text`` safe to encode as plain text: every ``<`` becomes ``<<``."""
        return exact_text(text).replace("<", "<<")

    @staticmethod
    def unescape(text):
        """Undo `escape`."""
        return exact_text(text).replace("<<", "<")

    def token_to_id(self, token):
        """The id of a vocabulary entry (newline and space as themselves), or None.

        Raises:
            TokenizeError: ``token`` is not a string.
        """
        self.require_vocabulary()
        return self.ids.get(exact_text(token))

    def id_to_token(self, token_id):
        r"""The vocabulary entry of an id (newline as ``"\n"``).

        Raises:
            TokenizeError: the id is not in the vocabulary.
        """
        self.require_vocabulary()
        return self.known[self.index_of(exact_id(token_id))]

    def __reduce__(self):
        return type(self), (self.tokens,)

    def __repr__(self):
        return f"Tokenizer(<{self.vocab_size} tokens>)"
