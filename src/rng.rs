//! The counter-based random number generator. Every random number is a pure function of (seed, epoch, sample, purpose,
//! repeat) and never of the state of a rank or a thread, so crops and masks are the same on 1, 2 or 1,024 ranks and
//! after every resume.
//!
//! Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Key = seed (64 bits);
//! counter = (id low, id high, epoch·256 + purpose, repeat·2²⁰ + block).

/// Purpose of a random stream. Each purpose has its own stream, so a new purpose changes no other stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    Mask = 0,
    Crop = 1,
    Flip = 2,
    Order = 3,
    Init = 4,
    Replace = 5,
    Probe = 6,
    RandAugment = 7,
    Jitter = 8,
    Grayscale = 9,
    Blur = 10,
    Solarize = 11,
    Erase = 12,
    Mixup = 13,
    Mixture = 14,
    Filter = 15,
    Token = 16,
    Cluster = 17,
    Generate = 18,
    Clip = 20,
}

/// A Philox stream of random numbers.
#[derive(Clone, Debug)]
pub struct Philox {
    key: [u32; 2],
    counter: [u32; 4],
    block: [u32; 4],
    used: usize,
}

impl Philox {
    /// Creates the stream of `purpose` for sample `id` in `epoch`. `repeat` distinguishes several clips of one video.
    ///
    /// # Panics
    /// If `epoch` exceeds 24 bits or `repeat` exceeds 12 bits.
    pub fn new(seed: u64, id: u64, epoch: u64, purpose: Purpose, repeat: u32) -> Self {
        assert!(epoch < 1 << 24, "epoch {epoch} does not fit 24 bits");
        assert!(repeat < 1 << 12, "repeat {repeat} does not fit 12 bits");
        Philox {
            key: [seed as u32, (seed >> 32) as u32],
            counter: [id as u32, (id >> 32) as u32, epoch as u32 * 256 + purpose as u32, repeat << 20],
            block: [0; 4],
            used: 4,
        }
    }

    /// Returns the next 32 random bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.used == 4 {
            self.block = philox4x32_10(self.counter, self.key);
            self.counter[3] += 1;
            self.used = 0;
        }
        self.used += 1;
        self.block[self.used - 1]
    }

    /// Samples uniformly from [0, 1) with 53 bits.
    pub fn uniform(&mut self) -> f64 {
        let high = u64::from(self.next_u32());
        let low = u64::from(self.next_u32());
        ((high << 32 | low) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Samples uniformly from [low, high).
    pub fn uniform_range(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.uniform()
    }

    /// Samples an integer uniformly from 0..n by Lemire's multiply-and-shift (bias below n / 2⁶⁴).
    pub fn uniform_int(&mut self, n: u64) -> u64 {
        let word = u64::from(self.next_u32()) << 32 | u64::from(self.next_u32());
        ((u128::from(word) * u128::from(n)) >> 64) as u64
    }

    /// Samples from the standard normal distribution by the Box–Muller transform.
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// Returns a random permutation of 0..n. It sorts the 64-bit keys (bits · 2³² + index), so that ties cannot make
    /// two implementations differ.
    pub fn permutation(&mut self, n: usize) -> Vec<u32> {
        let mut keys: Vec<u64> = (0..n as u64).map(|index| u64::from(self.next_u32()) << 32 | index).collect();
        keys.sort_unstable();
        keys.into_iter().map(|key| key as u32).collect()
    }
}

/// Computes one Philox4x32-10 block.
pub fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = u64::from(counter[0]) * 0xD251_1F53;
        let b = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [(b >> 32) as u32 ^ counter[1] ^ key[0], b as u32, (a >> 32) as u32 ^ counter[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

/// Returns the first 64 bits of BLAKE3 over the parts, separated by zero bytes. The id of a sample is
/// `hash_id(&[data set name, key])`, so that adding a shard changes the id of no other sample.
pub fn hash_id(parts: &[&str]) -> u64 {
    let mut hasher = blake3::Hasher::new();
    for (index, part) in parts.iter().enumerate() {
        if index > 0 {
            hasher.update(&[0]);
        }
        hasher.update(part.as_bytes());
    }
    u64::from_le_bytes(hasher.finalize().as_bytes()[..8].try_into().expect("eight bytes"))
}
