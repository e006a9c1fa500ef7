# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""The tokenizer on a trie; `cpmbee.plain.tokenizer` says what it computes."""

from cpython.list cimport PyList_New, PyList_SET_ITEM
from cpython.pycapsule cimport PyCapsule_New
from cpython.ref cimport Py_INCREF
from libc.stdlib cimport free, malloc

from cpmbee.errors import TokenizeError
from cpmbee.text_errors import unclosed_special
from cpmbee.vocabulary import check_vocabulary, is_special, read_vocabulary

include "scan.pxi"


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

    cdef Trie *trie
    cdef dict ids
    cdef tuple known  # the tokens; newline and space as themselves
    cdef tuple decoded  # the tokens as text that can be encoded again
    cdef tuple numbers  # the ids as Python integers, so that encoding makes none
    cdef readonly tuple tokens
    cdef readonly object trie_capsule  # for cpmbee._prompt, valid as long as this object
    cdef readonly int vocab_size, pad_id, unk_id, mask_id, bos_id, eos_id, root_id, ans_id

    def __init__(self, tokens):
        if self.trie is not NULL:
            raise RuntimeError("a Tokenizer is built once")
        self.ids = check_vocabulary(tokens)
        self.tokens = tuple(tokens)
        self.known = tuple(self.ids)
        self.decoded = tuple([t if is_special(t) else t.replace("<", "<<") for t in self.known])
        self.vocab_size = len(self.known)
        self.numbers = tuple(range(self.vocab_size))
        self.pad_id, self.unk_id, self.mask_id = self.ids["<pad>"], self.ids["<unk>"], self.ids["<mask>"]
        self.bos_id, self.eos_id = self.ids["<s>"], self.ids["</s>"]
        self.root_id, self.ans_id = self.ids["<root>"], self.ids["<ans>"]
        self.build_trie()

    cdef int build_trie(self) except -1:
        cdef size_t room = 2 * len(self.known)
        while not self.fill_trie(room):  # nodes are where they are: a larger trie is filled anew
            trie_free(self.trie)
            self.trie = NULL
            room *= 2
        self.trie_capsule = PyCapsule_New(self.trie, TRIE_CAPSULE, NULL)
        return 0

    cdef bint fill_trie(self, size_t room) except -1:
        cdef str token
        cdef int32_t token_id = 0
        self.trie = trie_new(room)
        if self.trie is NULL:
            raise MemoryError("no memory for the vocabulary")
        for token in self.known:
            if not trie_insert(
                self.trie, TRIE_SPECIAL if is_special(token) else TRIE_PLAIN,
                PyUnicode_KIND(token), PyUnicode_DATA(token), PyUnicode_GET_LENGTH(token), token_id,
            ):
                return False
            token_id += 1
        return True

    def __dealloc__(self):
        trie_free(self.trie)

    @classmethod
    def from_file(cls, path):
        """Read ``vocab.txt``.

        Raises:
            VocabularyError: the file is not a usable vocabulary; names the file and the line.
        """
        return cls(read_vocabulary(path))

    def encode(self, text not None, ext_table=None):
        """Cut ``text`` into tokens.

        Args:
            text: any string; lone surrogates count as unknown characters.
            ext_table: ids given out earlier, which keep their meaning; it is not modified.

        Returns:
            The ids, and the ext table with what this text added.

        Raises:
            TokenizeError: a ``<`` opens a special token that does not close; names the character offset.
        """
        cdef Scan scan
        cdef ScanEvent event
        cdef Py_ssize_t count = 0
        cdef str plain = PyUnicode_FromObject(text)
        cdef str piece
        cdef dict table = dict(ext_table) if ext_table else {}
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
            TokenizeError: an id is in neither; names it.
        """
        cdef list pieces = []
        cdef dict table = dict(ext_table) if ext_table else None
        cdef Py_ssize_t index
        for token_id in ids:
            if table is not None and token_id in table:
                pieces.append(table[token_id])
                continue
            index = token_id
            if not 0 <= index < self.vocab_size:
                raise TokenizeError(f"token id {token_id} is not in the vocabulary of {self.vocab_size}")
            pieces.append(self.decoded[index])
        return "".join(pieces)

    @staticmethod
    def escape(text):
        """Make ``text`` safe to encode as plain text: every ``<`` becomes ``<<``."""
        return text.replace("<", "<<")

    @staticmethod
    def unescape(text):
        """Undo `escape`."""
        return text.replace("<<", "<")

    def token_to_id(self, token):
        """The id of a vocabulary entry (newline and space as themselves), or None."""
        return self.ids.get(token)

    def id_to_token(self, token_id):
        r"""The vocabulary entry of an id (newline as ``"\n"``).

        Raises:
            TokenizeError: the id is not in the vocabulary.
        """
        cdef Py_ssize_t index = token_id
        if not 0 <= index < self.vocab_size:
            raise TokenizeError(f"token id {token_id} is not in the vocabulary of {self.vocab_size}")
        return self.known[index]

    def __reduce__(self):
        return type(self), (self.tokens,)

    def __repr__(self):
        return f"Tokenizer(<{self.vocab_size} tokens>)"
