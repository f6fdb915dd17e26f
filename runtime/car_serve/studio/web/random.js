// numpy's default generator, bit for bit: SeedSequence, PCG64 (XSL-RR), and float32 numbers in [0, 1).

const M32 = (1n << 32n) - 1n;
const M64 = (1n << 64n) - 1n;
const M128 = (1n << 128n) - 1n;
const MULTIPLIER = 0x2360ed051fc65da44385df649fccf645n;
const POOL = 4; // words of entropy that SeedSequence mixes

// The same numbers as numpy.random.default_rng(seed).random(count, dtype=float32). seed: whole, 0…2⁶⁴, a number or a BigInt.
export function uniforms(seed, count) {
  const next = stream(seedState(words(BigInt(seed))));
  const values = new Float32Array(count);
  for (let i = 0; i < count; i++) values[i] = Number(next() >> 8n) / 2 ** 24;
  return values;
}

// A seed as 32-bit words, the lowest first.
function words(seed) {
  const found = [];
  for (let rest = seed; rest > 0n || !found.length; rest >>= 32n) found.push(Number(rest & M32));
  return found;
}

// SeedSequence.generate_state(4, uint64): what PCG64 starts from.
function seedState(entropy) {
  const hash = hasher(0x43b0d7e5, 0x931e8875);
  const pool = Array.from({ length: POOL }, (_, i) => hash(entropy[i] ?? 0));
  const mixIn = (value, skip) => {
    for (let i = 0; i < POOL; i++) if (i !== skip) pool[i] = mix(pool[i], hash(value()));
  };
  for (let i = 0; i < POOL; i++) mixIn(() => pool[i], i);
  for (const word of entropy.slice(POOL)) mixIn(() => word, -1);
  const out = hasher(0x8b51f9dd, 0x58f38ded);
  const state = Array.from({ length: 8 }, (_, i) => BigInt(out(pool[i % POOL])));
  return [0, 2, 4, 6].map((i) => (state[i + 1] << 32n) | state[i]);
}

function hasher(start, multiplier) {
  let constant = start;
  return (value) => {
    let mixed = value ^ constant;
    constant = Math.imul(constant, multiplier);
    mixed = Math.imul(mixed, constant);
    return (mixed ^ (mixed >>> 16)) >>> 0;
  };
}

function mix(x, y) {
  const mixed = (Math.imul(0xca01f9dd, x) - Math.imul(0x4973f715, y)) | 0;
  return (mixed ^ (mixed >>> 16)) >>> 0;
}

// PCG64: each 64-bit number gives two of 32 bits, the lower half first.
function stream([high, low, sequenceHigh, sequenceLow]) {
  const increment = ((((sequenceHigh << 64n) | sequenceLow) << 1n) | 1n) & M128;
  let state = 0n;
  const step = () => { state = (state * MULTIPLIER + increment) & M128; };
  step();
  state = (state + ((high << 64n) | low)) & M128;
  step();
  let kept = null;
  return () => {
    if (kept !== null) { const value = kept; kept = null; return value; }
    step();
    const folded = (state >> 64n) ^ (state & M64);
    const turn = state >> 122n;
    const value = ((folded >> turn) | (folded << (64n - turn))) & M64;
    kept = value >> 32n;
    return value & M32;
  };
}
