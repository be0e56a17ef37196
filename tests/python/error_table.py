"""Bad input, as a table: a call, the error it raises, and what the message says.

Calls are evaluated in the world of test_errors.py. "..." in a message stands for anything. Each
message names what was wrong, and what is allowed or what to do.
"""

from device import DEVICE, IS_HOST, PAGE

from kvspan import CapacityError, Error, InvalidArgument, OutOfMemory, ReleasedError
from kvspan._check import size_text

Case = tuple[str, type[Error], str]

NO_SIZE = 'must be a number of bytes or a size such as "512MiB" or "4GiB" (units ...), not '


def pages(n: float) -> str:
    """Return the size of so many pages, as messages have it."""
    return size_text(int(n * PAGE))


PAGE_SIZES = f"page_size...is a power of two from {pages(1)} to 64 MiB..., not "
FRAME_SIZES = f"max_frame_size must be 1, 2, 4, ... 1024 times the page size ({pages(1)}), not "
DTYPES = "dtype must be one of float32, float16, bfloat16, float8_e4m3fn, float8_e5m2, int8, not "
POSITIONS = "max_seq_len must be between 1 and 2147483647 (lengths are int32), not "
OVERREAD = 'overread_tokens must be "auto" or between 0 and max_seq_len, not '
EITHER = "a LayerSpec takes either n_kv_heads and head_dim, or planes"
WINDOW = "no layer of this cache has a sliding window...; give LayerSpec(..., window=n) to"
RELEASED = "this sequence was released; take a new one with cache.sequence()"
OF_CLOSED = "the cache of this sequence was closed"
CLOSED = "this cache was closed; make a new one with KVCache(pool"
POOL_CLOSED = "this pool was closed; make a new one with Pool("
NO_SLOT = "no free slot: 0 of max_seqs = 4 are free; release sequences or make the cache with more"

POOLS: list[Case] = [
    ("Pool(capacity=0)", InvalidArgument, "capacity must be between 1 and 2^63 - 1 bytes, not 0"),
    ("Pool(capacity=-1)", InvalidArgument, "capacity must be between 1 and 2^63 - 1 bytes, not -1"),
    ("Pool(capacity=1 << 80)", InvalidArgument, "capacity must be between 1 and 2^63 - 1 bytes"),
    ("Pool(capacity='four gigs')", InvalidArgument, f"capacity {NO_SIZE}'four gigs'"),
    ("Pool(capacity='4GB')", InvalidArgument, f"capacity {NO_SIZE}'4GB'"),
    ("Pool(capacity=1.5)", InvalidArgument, f"capacity {NO_SIZE}1.5"),
    ("Pool(capacity=None)", InvalidArgument, f"capacity {NO_SIZE}None"),
    (
        "pool_of(capacity=3 * PAGE // 2)",
        InvalidArgument,
        f"capacity is a positive multiple of the page size ({pages(1)}), not {pages(1.5)}",
    ),
    ("Pool(page_size=3 * PAGE)", InvalidArgument, f"{PAGE_SIZES}{pages(3)}"),
    ("Pool(page_size=4096)", InvalidArgument, f"{PAGE_SIZES}4 KiB"),
    ("Pool(page_size='128MiB')", InvalidArgument, f"{PAGE_SIZES}128 MiB"),
    ("Pool(page_size=0)", InvalidArgument, "page_size must be between 1 and"),
    ("pool_of(max_frame_size=3 * PAGE)", InvalidArgument, f"{FRAME_SIZES}{pages(3)}"),
    ("pool_of(max_frame_size=PAGE // 2)", InvalidArgument, f"{FRAME_SIZES}{pages(0.5)}"),
    ("pool_of(max_frame_size=0)", InvalidArgument, "max_frame_size must be between 1 and"),
    ("pool_of(preallocate=-5)", InvalidArgument, "preallocate must be between 0 and ..., not -5"),
    (
        "pool_of(preallocate='1GiB')",
        OutOfMemory,
        f"1 GiB asked, {pages(32)} free, ...create fewer frames ahead, or make a larger pool",
    ),
    (
        "pool_of(preallocate=PAGE, reserve='100TiB')",
        OutOfMemory,
        f"{pages(1)} asked, 0 B free, ...100 TiB of which are kept for others (`reserve`): release",
    ),
    (
        "Pool(huge_pages='huge')",
        InvalidArgument,
        'huge_pages must be True, False, "hugetlb" or "auto", not \'huge\'',
    ),
    ("Pool(numa_node=-1)", InvalidArgument, "numa_node must be between 0 and 2147483647, not -1"),
    ("Pool(numa_node='0')", InvalidArgument, "numa_node must be an integer, not '0'"),
    ("Pool(reserve='all')", InvalidArgument, f"reserve {NO_SIZE}'all'"),
    ("Pool('tpu')", InvalidArgument, 'device must be "cpu", "cuda" or "cuda:N", not \'tpu\''),
    ("pool.preallocate(0.5)", InvalidArgument, f"n_bytes {NO_SIZE}0.5"),
    ("closed_pool.preallocate(1)", ReleasedError, POOL_CLOSED),
    ("closed_pool.trim()", ReleasedError, POOL_CLOSED),
    ("closed_pool.stats()", ReleasedError, POOL_CLOSED),
    ("cache_of(closed_pool)", ReleasedError, POOL_CLOSED),
]

CACHES: list[Case] = [
    (
        "KVCache('cpu', 1, 1, 16, max_seqs=1, max_seq_len=1)",
        InvalidArgument,
        "pool must be a kvspan.Pool, not str",
    ),
    ("cache_of(n_layers=0)", InvalidArgument, "n_layers must be between 1 and 65536, not 0"),
    ("cache_of(n_layers=1.5)", InvalidArgument, "n_layers must be an integer, not 1.5"),
    ("cache_of(n_layers='3')", InvalidArgument, "n_layers must be an integer, not '3'"),
    ("cache_of(n_layers=None)", InvalidArgument, "needs n_layers, n_kv_heads and head_dim, or la"),
    ("cache_of(n_kv_heads=0)", InvalidArgument, "heads must be between 1 and 1048576, not 0"),
    ("cache_of(n_kv_heads=1 << 70)", InvalidArgument, "heads must be between 1 and 1048576, not 1"),
    ("cache_of(head_dim=-64)", InvalidArgument, "dim must be between 1 and 1048576, not -64"),
    ("cache_of(head_dim='64')", InvalidArgument, "plane 'k': dim must be an integer, not '64'"),
    ("cache_of(dtype=torch.float64)", InvalidArgument, f"{DTYPES}torch.float64"),
    ("cache_of(dtype=np.float32)", InvalidArgument, DTYPES),
    ("cache_of(dtype='bfloat16')", InvalidArgument, f"{DTYPES}bfloat16"),
    ("cache_of(dtype=[])", InvalidArgument, f"{DTYPES}[]"),
    (
        "cache_of(layers=[LayerSpec(1, 16)])",
        InvalidArgument,
        "give either layers=[...] or n_layers, n_kv_heads and head_dim, not both",
    ),
    ("layers_of([])", InvalidArgument, "a cache needs at least one layer"),
    ("layers_of([1])", InvalidArgument, "layers is a list of LayerSpec, one a layer, not of 1"),
    ("layers_of(LayerSpec(1, 16))", InvalidArgument, "layers is a list of LayerSpec, one a layer"),
    ("LayerSpec(1)", InvalidArgument, "a LayerSpec without planes needs n_kv_heads and head_dim"),
    ("LayerSpec()", InvalidArgument, EITHER),
    ("LayerSpec(1, 16, planes=(Plane('k', 1, 16),))", InvalidArgument, EITHER),
    ("LayerSpec(head_dim=16, planes=(Plane('k', 1, 16),))", InvalidArgument, EITHER),
    ("LayerSpec(planes='kv')", InvalidArgument, "planes is a tuple of Plane, not 'kv'"),
    ("LayerSpec(planes=Plane('k', 1, 16))", InvalidArgument, "planes is a tuple of Plane, not Pla"),
    (
        "layers_of([LayerSpec(1, 16, window=0)])",
        InvalidArgument,
        "window, if not None, must be between 1 and 2147483647, not 0",
    ),
    (
        "layers_of([LayerSpec(1, 16, window=1.5)])",
        InvalidArgument,
        "window, if not None, must be an integer, not 1.5",
    ),
    (
        "cache_of(layers_per_page=3)",
        InvalidArgument,
        'layers_per_page must be "auto" or one of 1, 2, 4, not 3',
    ),
    (
        "cache_of(layers_per_page=0)",
        InvalidArgument,
        'layers_per_page, if not "auto", must be between 1 and 2147483647, not 0',
    ),
    (
        "cache_of(layers_per_page='some')",
        InvalidArgument,
        "layers_per_page, if not \"auto\", must be an integer, not 'some'",
    ),
    ("cache_of(max_seqs=0)", InvalidArgument, "max_seqs must be between 1 and 1048576, not 0"),
    ("cache_of(max_seqs=1 << 21)", InvalidArgument, "max_seqs must be between 1 and 1048576, not"),
    ("cache_of(max_seq_len=0)", InvalidArgument, f"{POSITIONS}0"),
    ("cache_of(max_seq_len=-1)", InvalidArgument, f"{POSITIONS}-1"),
    ("cache_of(max_seq_len=1 << 31)", InvalidArgument, f"{POSITIONS}2147483648"),
    ("cache_of(max_seq_len=1 << 70)", InvalidArgument, "max_seq_len is out of range (...int32, at"),
    ("cache_of(overread_tokens=-1)", InvalidArgument, f"{OVERREAD}-1"),
    ("cache_of(overread_tokens=1001)", InvalidArgument, f"{OVERREAD}1001"),
    (
        "cache_of(unmapped='maybe')",
        InvalidArgument,
        'unmapped must be one of "zero", "fault", not \'maybe\'',
    ),
    ("cache_of(scrub=None)", InvalidArgument, 'scrub must be one of "cross", "reuse", not None'),
    ("cache_of(keep='some')", InvalidArgument, f"keep, if not \"auto\", {NO_SIZE}'some'"),
    ("cache_of(keep=-1)", InvalidArgument, 'keep, if not "auto", must be between 0 and ...not -1'),
    ("cache.layer(-1)", InvalidArgument, "the layers are 0 to 3, not -1"),
    ("cache.layer(4)", InvalidArgument, "the layers are 0 to 3, not 4"),
    ("[cache.layer(1), cache.layer(1.0)]", InvalidArgument, "index must be an integer, not 1.0"),
    ("cache.layer([0])", InvalidArgument, "the layer's index must be an integer, not [0]"),
    ("cache.view(9, 0)", InvalidArgument, "the layers are 0 to 3, not 9"),
    ("cache.view(0, 5)", InvalidArgument, "the planes of layer 0 are 0 to 1, not 5"),
    ("cache.view('0', 0)", InvalidArgument, "the layer's index must be an integer, not '0'"),
    ("closed.sequence()", ReleasedError, CLOSED),
    ("closed.batch(1)", ReleasedError, CLOSED),
    ("closed.layer(0)", ReleasedError, CLOSED),
    ("closed.view(0, 0)", ReleasedError, CLOSED),
    ("closed.trim()", ReleasedError, CLOSED),
    ("closed.stats()", ReleasedError, CLOSED),
    ("closed.page_map()", ReleasedError, CLOSED),
]

SEQUENCES: list[Case] = [
    ("cache.sequence()", CapacityError, NO_SLOT),
    ("other.sequence(-1)", InvalidArgument, "expected number of tokens must be 0 or more, not -1"),
    ("other.sequence(-1, token_ids=[1, 2])", InvalidArgument, "must be 0 or more, not -1"),
    ("other.sequence('3')", InvalidArgument, "n_tokens must be an integer, not '3'"),
    ("a.extend(0)", InvalidArgument, "extend takes 1 token or more, not 0"),
    ("a.extend(-1)", InvalidArgument, "extend takes 1 token or more, not -1"),
    ("a.extend(1.5)", InvalidArgument, "n_tokens must be an integer, not 1.5"),
    ("a.extend('3')", InvalidArgument, "n_tokens must be an integer, not '3'"),
    ("a.extend(None)", InvalidArgument, "n_tokens must be an integer, not None"),
    (
        "a.extend(701)",
        CapacityError,
        "300 tokens cannot grow by 701: max_seq_len is 1000; truncate it or make the cache with",
    ),
    ("a.extend(1 << 31)", CapacityError, "cannot grow by 2147483648: max_seq_len is 1000; trunc"),
    ("a.extend(1 << 70)", InvalidArgument, "n_tokens is out of range (...at most 2^31 - 1"),
    (
        "a.extend(700)",
        OutOfMemory,
        f"out of memory: {pages(14)} asked, {pages(8)} free, 0 B reclaimable; the pool's capacity "
        f"is {pages(32)}: release or truncate sequences, or make a larger pool",
    ),
    ("released.extend(1)", ReleasedError, RELEASED),
    ("orphan.extend(1)", ReleasedError, OF_CLOSED),
    (
        "a.truncate(-1)",
        InvalidArgument,
        "truncate takes a length between 0 and the present one, 300, not -1",
    ),
    ("a.truncate(301)", InvalidArgument, "between 0 and the present one, 300, not 301"),
    ("a.truncate(0.5)", InvalidArgument, "length must be an integer, not 0.5"),
    (
        "windowed.truncate(99)",
        InvalidArgument,
        "cannot truncate to 99 tokens: positions before 100 were dropped; release the sequence and",
    ),
    ("released.truncate(0)", ReleasedError, RELEASED),
    ("a.drop_before(1)", InvalidArgument, WINDOW),
    (
        "windowed.drop_before(162)",
        InvalidArgument,
        "between 0 and 161 here (length 200 less the largest window), not 162",
    ),
    ("windowed.drop_before(-1)", InvalidArgument, "drop_before takes a position between 0 and 161"),
    ("a.fork()", CapacityError, NO_SLOT),
    ("released.fork()", ReleasedError, RELEASED),
    ("released.layer(0)", ReleasedError, "was released; its slot may be another's now"),
    ("released.slot", ReleasedError, "a released sequence has no slot; take a new one"),
    ("a.layer(4)", InvalidArgument, "the layers are 0 to 3, not 4"),
]

BATCHES: list[Case] = [
    ("cache.batch([])", InvalidArgument, "a batch has at least one row"),
    (
        "cache.batch(0)",
        InvalidArgument,
        "rows, if not a list of sequences, must be between 1 and 2147483647, not 0",
    ),
    ("cache.batch(2.5)", InvalidArgument, "rows, if not a list of sequences, must be an integer"),
    ("cache.batch('ab')", InvalidArgument, "rows, if not a list of sequences, must be an integer"),
    ("cache.batch([1])", InvalidArgument, "a batch is made of sequences, not 1"),
    (
        "cache.batch([a, b, a])",
        InvalidArgument,
        "a sequence is in the batch twice; fork() it to decode it twice",
    ),
    (
        "cache.batch([a, foreign])",
        InvalidArgument,
        "a sequence of another cache cannot be a row of this cache's batch",
    ),
    (
        "other.batch([foreign, released])",
        ReleasedError,
        "row 1 is a sequence that was released; leave it out",
    ),
    (
        "other.batch(4)",
        CapacityError,
        "no 4 adjacent free slots: 3 of max_seqs = 4 are free; release sequences or make the cache",
    ),
    ("rows.step(0)", InvalidArgument, "step takes 1 token or more, not 0"),
    ("rows.step(-1)", InvalidArgument, "step takes 1 token or more, not -1"),
    ("rows.step(1.5)", InvalidArgument, "n_tokens must be an integer, not 1.5"),
    (
        "listed.step(701)",
        CapacityError,
        "row 0 has 300 tokens and cannot grow by 701: max_seq_len is 1000; take the row out of the",
    ),
    ("listed.step(400)", OutOfMemory, f"{pages(16)} asked, {pages(8)} free, ...release or trunc"),
    ("row_released.step()", ReleasedError, RELEASED),
    ("orphans.step()", ReleasedError, OF_CLOSED),
    (
        "listed.layer(0)",
        InvalidArgument,
        "need adjacent slots: make the batch with cache.batch(n), or index cache.layer(i) by batch",
    ),
    ("rows.layer(4)", InvalidArgument, "the layers are 0 to 3, not 4"),
    (
        "listed.select([0])",
        InvalidArgument,
        "select needs rows in adjacent slots: make the batch with cache.batch(n), not from a list",
    ),
    ("rows.select([])", InvalidArgument, "select takes 1 to 2 rows (the slots of this batch), not"),
    ("rows.select([0, 1, 0])", InvalidArgument, "select takes 1 to 2 rows (...), not 3"),
    ("rows.select([0, 2])", InvalidArgument, "select takes rows 0 to 1, not [0, 2]"),
    ("rows.select([-1])", InvalidArgument, "select takes rows 0 to 1, not [-1]"),
    ("rows.select([1 << 40])", InvalidArgument, "select takes rows 0 to 1, not [1099511627776]"),
    ("rows.select(torch.tensor([0.0]))", InvalidArgument, "a row must be an integer, not 0.0"),
    ("rows.select(None)", InvalidArgument, "rows is a list of row numbers, not None"),
    ("orphans.select([0])", ReleasedError, CLOSED),
]

OF_A_HOST: list[Case] = [
    (
        "Pool(capacity='1000TiB')",
        InvalidArgument,
        "capacity is 1000 TiB, more than the ...iB of memory that this process may use",
    ),
    ("Pool(peers=[1])", InvalidArgument, "peers and shareable are for GPUs; leave them out with"),
    (
        "Pool(huge_pages='hugetlb', page_size='2MiB', capacity='1000TiB')",
        CapacityError,
        "1000 TiB and the machine has set aside ...B of huge pages of 2 MiB: raise vm.nr_hugepages",
    ),
    (
        "Pool(huge_pages='hugetlb', page_size='1MiB')",
        InvalidArgument,
        "pages of 1 MiB cannot be mapped out of huge pages of 2 MiB: take a page_size of at least",
    ),
    (
        "Pool(huge_pages='hugetlb', page_size='2MiB', reserve='1MiB')",
        InvalidArgument,
        "reserve leaves ordinary memory to others, and hugetlb pages are none: leave it out",
    ),
    ("Pool(numa_node=1000)", InvalidArgument, "numa_node 1000 has no memory that this process may"),
    (
        "a.extend(1, stream=5)",
        InvalidArgument,
        "the host has no streams; leave stream out, instead",
    ),
    (
        "cache_of(max_seqs=1000, max_seq_len=1 << 28)",
        CapacityError,
        "cannot reserve ... TiB: the address space has no such range left; use fewer slots or posi",
    ),
]

OF_A_GPU: list[Case] = [
    (
        "Pool(capacity='400TiB')",
        InvalidArgument,
        f"capacity is 400 TiB, more than the ...iB of memory that {DEVICE} has",
    ),
    ("Pool(huge_pages='hugetlb')", InvalidArgument, "hugetlb pages and numa_node are for a host's"),
    (
        "Pool(huge_pages='auto')",
        InvalidArgument,
        "hugetlb pages and numa_node are for a host's mem",
    ),
    (
        "Pool(numa_node=0)",
        InvalidArgument,
        "hugetlb pages and numa_node are for a host's memory; l",
    ),
    ("Pool(peers=[0])", InvalidArgument, "cuda:0 cannot be a peer of cuda:0: peers are other dev"),
    (
        "a.extend(1, stream='5')",
        InvalidArgument,
        "stream must be a torch.cuda.Stream, an object with __cuda_stream__, a stream's handle or",
    ),
    (
        "cache_of(max_seqs=1000, max_seq_len=1 << 28)",
        CapacityError,
        "the driver has no address space left for ...iB: lower max_seqs or max_seq_len",
    ),
]

TABLE = POOLS + CACHES + SEQUENCES + BATCHES + (OF_A_HOST if IS_HOST else OF_A_GPU)
