//! The counter-based generator. Randomness belongs to the sample: every draw is a pure function of
//! (seed, epoch, sample, purpose, repeat), never of a rank's or a thread's stream, so crops and masks are the same on
//! 1, 2 or 1,024 ranks and after every resume.
//!
//! Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Key = seed (64 bits);
//! counter = (id low, id high, epoch·256 + purpose, repeat·2²⁰ + block).

/// What a draw is for; each purpose has a stream of its own, so that a new one moves no other.
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
    Grey = 9,
    Blur = 10,
    Solarise = 11,
    Erase = 12,
    Mix = 13,
    Mixture = 14,
    Clip = 20,
}

/// One stream of numbers.
#[derive(Clone, Debug)]
pub struct Draw {
    key: [u32; 2],
    counter: [u32; 4],
    block: [u32; 4],
    used: usize,
}

impl Draw {
    /// The stream of `purpose` for sample `id` in `epoch`; `repeat` tells several clips of one video apart.
    pub fn new(seed: u64, id: u64, epoch: u64, purpose: Purpose, repeat: u32) -> Self {
        assert!(epoch < 1 << 24, "epoch {epoch} does not fit 24 bits");
        assert!(repeat < 1 << 12, "repeat {repeat} does not fit 12 bits");
        Draw {
            key: [seed as u32, (seed >> 32) as u32],
            counter: [id as u32, (id >> 32) as u32, epoch as u32 * 256 + purpose as u32, repeat << 20],
            block: [0; 4],
            used: 4,
        }
    }

    /// The next 32 bits.
    pub fn bits(&mut self) -> u32 {
        if self.used == 4 {
            self.block = philox(self.counter, self.key);
            self.counter[3] += 1;
            self.used = 0;
        }
        self.used += 1;
        self.block[self.used - 1]
    }

    /// Uniform in [0, 1), 53 bits.
    pub fn uniform(&mut self) -> f64 {
        let high = u64::from(self.bits());
        let low = u64::from(self.bits());
        ((high << 32 | low) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in [low, high).
    pub fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.uniform()
    }

    /// Uniform among 0..n, by Lemire's multiply-and-shift (bias below n / 2⁶⁴).
    pub fn below(&mut self, n: u64) -> u64 {
        let word = u64::from(self.bits()) << 32 | u64::from(self.bits());
        ((u128::from(word) * u128::from(n)) >> 64) as u64
    }

    /// Standard normal, by Box and Muller.
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// 0..n in random order: the 64-bit keys (bits · 2³² + index) sorted, so that ties cannot make two
    /// implementations differ.
    pub fn order(&mut self, n: usize) -> Vec<u32> {
        let mut keys: Vec<u64> = (0..n as u64).map(|index| u64::from(self.bits()) << 32 | index).collect();
        keys.sort_unstable();
        keys.into_iter().map(|key| key as u32).collect()
    }
}

/// One Philox4x32-10 block.
pub fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = u64::from(counter[0]) * 0xD251_1F53;
        let b = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [(b >> 32) as u32 ^ counter[1] ^ key[0], b as u32, (a >> 32) as u32 ^ counter[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

/// The first 64 bits of BLAKE3 over the parts, separated by zero bytes: the id of a sample is
/// `id(&[data set name, key])`, so that adding a shard changes no other sample.
pub fn id(parts: &[&str]) -> u64 {
    let mut hasher = blake3::Hasher::new();
    for (index, part) in parts.iter().enumerate() {
        if index > 0 {
            hasher.update(&[0]);
        }
        hasher.update(part.as_bytes());
    }
    u64::from_le_bytes(hasher.finalize().as_bytes()[..8].try_into().expect("eight bytes"))
}
