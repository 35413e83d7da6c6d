"""llama.cpp's own library by ctypes, for the scripts in this folder.

The library is the one in the npm package `@node-llama-cpp/linux-x64` (llama.cpp 0.5.0, MIT license). `install` fetches the package with
`npm pack`, checks its digest and unpacks it into ~/.cache/moonlight-for-burn/llama.cpp, or into the folder in LLAMA_CPP_CACHE. The structures
below are those of include/llama.h of that release; `Library` compares the defaults that the library fills in with what that header says, so
that another release is refused rather than misread.

A `Model` is exact by default: f32 keys and values, and no flash attention, as for comparing log-probabilities. With `exact=False` it has the
settings that llama.cpp's own programs have, and a pool of threads that stays, as for measuring time.
"""

import ctypes
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import tarfile
import tempfile

from common import late

np = late("numpy")

PACKAGE = "@node-llama-cpp/linux-x64@3.22.1"
DIGEST = "0d953e1503d5ab4608d8ed5b739132308c81ac05ffeb760d2a7f30e08a9f90e0"
FOLDER = "package/bins/linux-x64"
VERSION = "v0.5.0"
CACHE = pathlib.Path(
    os.environ.get("LLAMA_CPP_CACHE") or pathlib.Path.home() / ".cache" / "moonlight-for-burn" / "llama.cpp"
)

POINTER, INT, UINT, FLOAT, BOOL = (
    ctypes.c_void_p,
    ctypes.c_int32,
    ctypes.c_uint32,
    ctypes.c_float,
    ctypes.c_bool,
)


class Unavailable(Exception):
    """The library cannot be had here: why not, as a sentence."""


def install():
    """The folder of the library, which is fetched if it is not in the cache."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise Unavailable(
            f"the library is for Linux on x86_64, and this is {platform.system()} on {platform.machine()}"
        )
    folder = CACHE / DIGEST[:16] / FOLDER
    if folder.is_dir():
        return folder
    if not shutil.which("npm"):
        raise Unavailable("npm, which fetches the library, is not installed")
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as home:
        fetched = subprocess.run(
            ["npm", "pack", "--silent", PACKAGE], cwd=home, capture_output=True, text=True, check=False
        )
        archives = list(pathlib.Path(home).glob("*.tgz"))
        if fetched.returncode or len(archives) != 1:
            raise Unavailable(f"npm cannot fetch {PACKAGE}: {fetched.stderr.strip()[-200:]}")
        if (found := hashlib.sha256(archives[0].read_bytes()).hexdigest()) != DIGEST:
            raise SystemExit(f"{PACKAGE} has the SHA-256 {found} instead of {DIGEST}")
        with tarfile.open(archives[0]) as archive:
            archive.extractall(pathlib.Path(home) / "unpacked", filter="data")
        target = CACHE / DIGEST[:16]
        if not target.exists():
            (pathlib.Path(home) / "unpacked").rename(target)
    return folder


class ModelParams(ctypes.Structure):
    _fields_ = [
        ("devices", POINTER),
        ("tensor_buft_overrides", POINTER),
        ("n_gpu_layers", INT),
        ("split_mode", INT),
        ("load_mode", INT),
        ("lazy_mode", INT),
        ("main_gpu", INT),
        ("tensor_split", POINTER),
        ("progress_callback", POINTER),
        ("progress_callback_user_data", POINTER),
        ("kv_overrides", POINTER),
        ("vocab_only", BOOL),
        ("check_tensors", BOOL),
        ("use_extra_bufts", BOOL),
        ("no_host", BOOL),
        ("no_alloc", BOOL),
        ("load_mtp", BOOL),
    ]


class ContextParams(ctypes.Structure):
    _fields_ = [
        ("n_ctx", UINT),
        ("n_batch", UINT),
        ("n_ubatch", UINT),
        ("n_seq_max", UINT),
        ("n_rs_seq", UINT),
        ("n_outputs_max", UINT),
        ("n_outputs_max_per_seq", UINT),
        ("n_threads", INT),
        ("n_threads_batch", INT),
        ("ctx_type", INT),
        ("rope_scaling_type", INT),
        ("pooling_type", INT),
        ("attention_type", INT),
        ("flash_attn_type", INT),
        ("rope_freq_base", FLOAT),
        ("rope_freq_scale", FLOAT),
        ("yarn_ext_factor", FLOAT),
        ("yarn_attn_factor", FLOAT),
        ("yarn_beta_fast", FLOAT),
        ("yarn_beta_slow", FLOAT),
        ("yarn_orig_ctx", UINT),
        ("defrag_thold", FLOAT),
        ("cb_eval", POINTER),
        ("cb_eval_user_data", POINTER),
        ("type_k", INT),
        ("type_v", INT),
        ("abort_callback", POINTER),
        ("abort_callback_data", POINTER),
        ("embeddings", BOOL),
        ("offload_kqv", BOOL),
        ("no_perf", BOOL),
        ("op_offload", BOOL),
        ("swa_full", BOOL),
        ("kv_unified", BOOL),
        ("samplers", POINTER),
        ("n_samplers", ctypes.c_size_t),
        ("ctx_other", POINTER),
    ]


class QuantizeParams(ctypes.Structure):
    _fields_ = [
        ("nthread", INT),
        ("ftype", INT),
        ("output_tensor_type", INT),
        ("token_embedding_type", INT),
        ("allow_requantize", BOOL),
        ("quantize_output_tensor", BOOL),
        ("only_copy", BOOL),
        ("pure", BOOL),
        ("keep_split", BOOL),
        ("dry_run", BOOL),
        ("imatrix", POINTER),
        ("kv_overrides", POINTER),
        ("tt_overrides", POINTER),
        ("prune_layers", POINTER),
        ("max_buf_size", ctypes.c_size_t),
    ]


class ThreadpoolParams(ctypes.Structure):
    _fields_ = [
        ("cpumask", BOOL * 512),
        ("n_threads", ctypes.c_int),
        ("prio", ctypes.c_int),
        ("poll", UINT),
        ("strict_cpu", BOOL),
        ("paused", BOOL),
    ]


class Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", INT),
        ("token", ctypes.POINTER(INT)),
        ("embd", ctypes.POINTER(FLOAT)),
        ("pos", ctypes.POINTER(INT)),
        ("n_seq_id", ctypes.POINTER(INT)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(INT))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, POINTER)
ERROR_LEVEL = 4
# `llama_ftype`: the mixtures that llama.cpp's own quantizer makes.
MIXTURES = {"q4_0": 2, "q8_0": 7, "q4_k_m": 15, "bf16": 32}


class Library:
    """The loaded library. `messages` has what it logged as errors since it was last emptied."""

    def __init__(self, folder=None):
        """`folder` has the libraries; without it they are those of `install`."""
        folder = pathlib.Path(folder or install())
        base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        ggml = ctypes.CDLL(str(folder / f"libggml.{VERSION}.so"), mode=ctypes.RTLD_GLOBAL)
        self.llama = ctypes.CDLL(str(folder / f"libllama.{VERSION}.so"), mode=ctypes.RTLD_GLOBAL)
        self._keep = [base, ggml]
        self.messages = []

        def log(level, text, _):
            if level == ERROR_LEVEL:
                self.messages.append(text.decode(errors="replace").strip())

        self._log = LOG(log)
        tokens = ctypes.POINTER(INT)
        for name, result, arguments in [
            ("llama_log_set", None, [LOG, POINTER]),
            ("llama_backend_init", None, []),
            ("llama_model_default_params", ModelParams, []),
            ("llama_context_default_params", ContextParams, []),
            ("llama_model_load_from_file", POINTER, [ctypes.c_char_p, ModelParams]),
            ("llama_init_from_model", POINTER, [POINTER, ContextParams]),
            ("llama_model_free", None, [POINTER]),
            ("llama_free", None, [POINTER]),
            ("llama_model_get_vocab", POINTER, [POINTER]),
            ("llama_model_chat_template", ctypes.c_char_p, [POINTER, ctypes.c_char_p]),
            ("llama_vocab_n_tokens", INT, [POINTER]),
            ("llama_vocab_bos", INT, [POINTER]),
            ("llama_vocab_eos", INT, [POINTER]),
            ("llama_vocab_is_eog", BOOL, [POINTER, INT]),
            ("llama_vocab_get_add_bos", BOOL, [POINTER]),
            ("llama_vocab_get_add_eos", BOOL, [POINTER]),
            ("llama_tokenize", INT, [POINTER, ctypes.c_char_p, INT, tokens, INT, BOOL, BOOL]),
            ("llama_get_memory", POINTER, [POINTER]),
            ("llama_memory_clear", None, [POINTER, BOOL]),
            ("llama_batch_init", Batch, [INT, INT, INT]),
            ("llama_batch_free", None, [Batch]),
            ("llama_batch_get_one", Batch, [tokens, INT]),
            ("llama_decode", INT, [POINTER, Batch]),
            ("llama_get_logits_ith", ctypes.POINTER(FLOAT), [POINTER, INT]),
            ("llama_memory_seq_rm", BOOL, [POINTER, INT, INT, INT]),
            ("llama_synchronize", None, [POINTER]),
            ("llama_attach_threadpool", None, [POINTER, POINTER, POINTER]),
            ("llama_sampler_init_greedy", POINTER, []),
            ("llama_sampler_sample", INT, [POINTER, POINTER, INT]),
            ("llama_model_quantize_default_params", QuantizeParams, []),
            ("llama_model_quantize", UINT, [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(QuantizeParams)]),
            ("llama_model_size", ctypes.c_uint64, [POINTER]),
            ("llama_model_n_params", ctypes.c_uint64, [POINTER]),
            ("llama_adapter_lora_init", POINTER, [POINTER, ctypes.c_char_p]),
            (
                "llama_set_adapters_lora",
                INT,
                [POINTER, ctypes.POINTER(POINTER), ctypes.c_size_t, ctypes.POINTER(FLOAT)],
            ),
        ]:
            function = getattr(self.llama, name)
            function.restype, function.argtypes = result, arguments
        ggml.ggml_backend_load_all_from_path.argtypes = [ctypes.c_char_p]
        for library, name, result, arguments in [
            (ggml, "ggml_backend_reg_by_name", POINTER, [ctypes.c_char_p]),
            (base, "ggml_backend_reg_get_proc_address", POINTER, [POINTER, ctypes.c_char_p]),
            (base, "ggml_threadpool_params_default", ThreadpoolParams, [ctypes.c_int]),
        ]:
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self.llama.llama_log_set(self._log, None)
        ggml.ggml_backend_load_all_from_path(str(folder).encode())
        self.llama.llama_backend_init()
        self._check_layout()

    def _check_layout(self):
        model, context = self.llama.llama_model_default_params(), self.llama.llama_context_default_params()
        found = [
            (model.n_gpu_layers, model.split_mode, model.vocab_only, model.use_extra_bufts),
            (context.n_ctx, context.n_batch, context.n_ubatch, context.n_seq_max),
            (context.flash_attn_type, context.type_k, context.type_v, context.offload_kqv, context.kv_unified),
        ]
        if found != [(-1, 1, False, True), (512, 2048, 512, 1), (-1, 1, 1, True, False)]:
            raise SystemExit(f"the library has another layout than llama_cpp.py: {found}")

    def threadpool(self, threads):
        """Threads that stay between two calls; without such a pool llama.cpp starts threads for each graph."""
        base, ggml = self._keep
        backend = ggml.ggml_backend_reg_by_name(b"CPU")
        new = base.ggml_backend_reg_get_proc_address(backend, b"ggml_threadpool_new")
        params = base.ggml_threadpool_params_default(threads)
        return ctypes.CFUNCTYPE(POINTER, ctypes.POINTER(ThreadpoolParams))(new)(ctypes.byref(params))

    def quantize(self, source, target, mixture, threads=1):
        """Writes an f32 file in another type, as llama.cpp's program `llama-quantize` does without an importance matrix."""
        params = self.llama.llama_model_quantize_default_params()
        params.ftype, params.nthread = MIXTURES[mixture], threads
        if self.llama.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
            raise RuntimeError(f"llama.cpp does not quantize {source}: {'; '.join(self.messages)}")


class Model:
    """An opened GGUF file; with `vocabulary_only` it can only tokenize."""

    def __init__(self, library, path, vocabulary_only=False, context=512, threads=1, exact=True):
        self.library, self.llama = library, library.llama
        library.messages.clear()
        params = self.llama.llama_model_default_params()
        params.n_gpu_layers, params.vocab_only = 0, vocabulary_only
        self.model = self.llama.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp does not open {path}: {'; '.join(library.messages)}")
        self.vocab = self.llama.llama_model_get_vocab(self.model)
        self.vocab_size = self.llama.llama_vocab_n_tokens(self.vocab)
        self.context = None
        if not vocabulary_only:
            params = self.llama.llama_context_default_params()
            params.n_ctx, params.n_threads, params.n_threads_batch = context, threads, threads
            if exact:
                params.n_batch = params.n_ubatch = context
                # f32 keys and values, and no flash attention, which would round them.
                params.type_k = params.type_v = params.flash_attn_type = 0
            self.context = self.llama.llama_init_from_model(self.model, params)
            if not self.context:
                raise RuntimeError(f"llama.cpp makes no context for {path}: {'; '.join(library.messages)}")
            self.memory = self.llama.llama_get_memory(self.context)
            self.sampler = self.llama.llama_sampler_init_greedy()
            if not exact and threads > 1:
                self.llama.llama_attach_threadpool(self.context, library.threadpool(threads), None)

    def close(self):
        if self.context:
            self.llama.llama_free(self.context)
        self.llama.llama_model_free(self.model)
        self.context = self.model = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def tokenize(self, text, add_special=False, parse_special=False):
        """The tokens of a text."""
        data = text.encode()
        room = len(data) + 16
        tokens = (INT * room)()
        count = self.llama.llama_tokenize(self.vocab, data, len(data), tokens, room, add_special, parse_special)
        if count < 0:
            raise RuntimeError(f"{-count} tokens of {len(data)} bytes")
        return list(tokens[:count])

    def template(self, name=None):
        """A chat template, or `None`."""
        found = self.llama.llama_model_chat_template(self.model, name.encode() if name else None)
        return found.decode() if found is not None else None

    def logits(self, tokens):
        """The logits at every position, `[tokens, vocabulary]`."""
        self.llama.llama_memory_clear(self.memory, True)
        return self._decode(tokens, 0)

    def _decode(self, tokens, start):
        count = len(tokens)
        batch = self.llama.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for at, token in enumerate(tokens):
            batch.token[at], batch.pos[at], batch.logits[at] = token, start + at, 1
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
        status = self.llama.llama_decode(self.context, batch)
        self.llama.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode returns {status}")
        rows = [self.llama.llama_get_logits_ith(self.context, at) for at in range(count)]
        return np.stack([np.ctypeslib.as_array(row, shape=(self.vocab_size,)).copy() for row in rows])

    def greedy(self, tokens, count):
        """The tokens of the highest logits after a prompt, without regard to the end of a text."""
        last = self.logits(tokens)[-1]
        found = []
        for at in range(count):
            found.append(int(last.argmax()))
            last = self._decode(found[-1:], len(tokens) + at)[-1]
        return found

    def bits_per_weight(self):
        """The size of all tensors in bits, divided by the number of weights."""
        size, count = self.llama.llama_model_size(self.model), self.llama.llama_model_n_params(self.model)
        return 8 * size / count

    def forget(self, length):
        """Removes everything after the first `length` tokens of the context."""
        if not self.llama.llama_memory_seq_rm(self.memory, -1, length, -1):
            raise RuntimeError("llama.cpp cannot shorten its context")

    def extend(self, tokens):
        """Appends tokens to the context, in pieces of 512, and waits for the logits of the last one."""
        for start in range(0, len(tokens), 512):
            piece = tokens[start : start + 512]
            if status := self.llama.llama_decode(self.context, self._llama_batch(piece)):
                raise RuntimeError(f"llama_decode returns {status}")
        self.llama.llama_synchronize(self.context)

    def _llama_batch(self, tokens):
        # The array has to live until the batch was decoded.
        self._piece = (INT * len(tokens))(*tokens)
        return self.llama.llama_batch_get_one(self._piece, len(tokens))

    def most_likely(self):
        """The token with the highest logit after `extend`, by llama.cpp's own sampler."""
        return self.llama.llama_sampler_sample(self.sampler, self.context, -1)

    def set_adapter(self, path):
        """Applies an adapter; `None` removes it."""
        if path is None:
            adapters, scales, count = None, None, 0
        else:
            adapter = self.llama.llama_adapter_lora_init(self.model, str(path).encode())
            if not adapter:
                raise RuntimeError(f"llama.cpp does not open {path}: {'; '.join(self.library.messages)}")
            adapters, scales, count = (POINTER * 1)(adapter), (FLOAT * 1)(1.0), 1
        if status := self.llama.llama_set_adapters_lora(self.context, adapters, count, scales):
            raise RuntimeError(f"llama_set_adapters_lora returns {status}")
