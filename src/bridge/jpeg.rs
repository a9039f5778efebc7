//! A narrow, safe face of libjpeg-turbo's TurboJPEG 3 interface: the header of a JPEG, and its pixels, whole or only
//! those of a window, at full size or at 1/2, 1/4 or 1/8 of it.

use crate::fault::{Code, Fault, Result};
use std::ffi::{CStr, c_int, c_void};
use std::ptr::NonNull;
use turbojpeg_sys as tj;

/// One decompressor; it keeps its state from picture to picture. Not for two threads at once.
pub struct Decompressor {
    handle: NonNull<c_void>,
    bounds: Bounds,
}

// SAFETY: the handle is owned by this value alone, and libjpeg-turbo ties nothing of it to a thread.
unsafe impl Send for Decompressor {}

/// What a decompressor refuses to exceed.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    pub pixels: u64,
    /// Passes over a picture that its file may ask for.
    pub scans: u32,
    /// Bytes of coefficients and other working memory.
    pub memory: u64,
}

/// What the samples of a file mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    Grey,
    /// RGB, YCbCr: three channels.
    Colour,
    /// CMYK, YCCK: four channels.
    Ink,
}

/// What a picture is decoded to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pixels {
    Grey,
    Rgb,
    /// As stored; Adobe's files store 255 − ink.
    Cmyk,
}

impl Pixels {
    /// Bytes of one pixel.
    pub fn bytes(self) -> usize {
        match self {
            Pixels::Grey => 1,
            Pixels::Rgb => 3,
            Pixels::Cmyk => 4,
        }
    }
}

/// A JPEG's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    pub width: u32,
    pub height: u32,
    pub space: Space,
    /// Width and height of the unit in which a window can be cut out, in pixels; none where only the whole can be had.
    pub unit: Option<[u32; 2]>,
}

/// A box of whole pixels of the picture at the size it is decoded to. `left` is a multiple of the scaled unit's width.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    pub left: u32,
    pub top: u32,
    pub width: u32,
    pub height: u32,
}

/// A JPEG whose header was read.
pub struct Opened<'a> {
    jpeg: &'a mut Decompressor,
    bytes: &'a [u8],
    pub head: Head,
}

impl Decompressor {
    pub fn new(bounds: Bounds) -> Result<Decompressor> {
        // SAFETY: the call takes no pointer; a null handle is refused below.
        let handle = unsafe { tj::tj3Init(tj::TJINIT_TJINIT_DECOMPRESS as c_int) };
        let Some(handle) = NonNull::new(handle) else {
            return Err(Fault::failed("libjpeg-turbo does not start: no memory for a decompressor"));
        };
        let mut made = Decompressor { handle, bounds };
        let most = |value: u64| c_int::try_from(value).unwrap_or(c_int::MAX);
        made.set(tj::TJPARAM_TJPARAM_MAXPIXELS, most(bounds.pixels))?;
        made.set(tj::TJPARAM_TJPARAM_SCANLIMIT, most(bounds.scans.into()))?;
        made.set(tj::TJPARAM_TJPARAM_MAXMEMORY, most(bounds.memory.div_ceil(1 << 20)))?;
        // Colour profiles and comments are not kept.
        made.set(tj::TJPARAM_TJPARAM_SAVEMARKERS, 0)?;
        Ok(made)
    }

    fn set(&mut self, parameter: tj::TJPARAM, value: c_int) -> Result<()> {
        // SAFETY: a live handle; the other two are plain numbers.
        match unsafe { tj::tj3Set(self.handle.as_ptr(), parameter as c_int, value) } {
            0 => Ok(()),
            _ => Err(Fault::failed(format!("libjpeg-turbo takes no {value} for parameter {parameter}"))),
        }
    }

    fn get(&self, parameter: tj::TJPARAM) -> c_int {
        // SAFETY: a live handle; the other is a plain number.
        unsafe { tj::tj3Get(self.handle.as_ptr(), parameter as c_int) }
    }

    /// What the last call that failed said, and whether it was only a warning.
    fn complaint(&self) -> (String, bool) {
        // SAFETY: a live handle; the text is a C string that lives until the handle's next call, and is copied here.
        let (text, code) = unsafe {
            let text = CStr::from_ptr(tj::tj3GetErrorStr(self.handle.as_ptr()));
            (text.to_string_lossy().into_owned(), tj::tj3GetErrorCode(self.handle.as_ptr()))
        };
        (text, code == tj::TJERR_TJERR_WARNING as c_int)
    }

    /// Reads the header. Faults with Code::Corrupt where there is none, or one that promises what libjpeg-turbo or this
    /// program cannot read: other than 8 bits a sample, or channels that are neither grey, colour nor ink.
    pub fn open<'a>(&'a mut self, bytes: &'a [u8]) -> Result<Opened<'a>> {
        self.set(tj::TJPARAM_TJPARAM_STOPONWARNING, 0)?;
        // SAFETY: a live handle, and a pointer with the length of what it points to; nothing is kept of it.
        let read = unsafe { tj::tj3DecompressHeader(self.handle.as_ptr(), bytes.as_ptr(), bytes.len() as _) };
        if read != 0 {
            // A warning (a version of JFIF that nobody knows) leaves the header read. What went wrong after a warning
            // is still called one, but the text is that of what came last.
            let (text, warning) = self.complaint();
            if !(warning && harmless(&text)) {
                // The next picture would be read on from where this one broke off.
                *self = Decompressor::new(self.bounds)?;
                return Err(corrupt(text));
            }
        }
        let side = |value: c_int| u32::try_from(value).unwrap_or(0);
        let width = side(self.get(tj::TJPARAM_TJPARAM_JPEGWIDTH));
        let height = side(self.get(tj::TJPARAM_TJPARAM_JPEGHEIGHT));
        if width == 0 || height == 0 {
            return Err(corrupt("a JPEG of no pixels"));
        }
        let bits = self.get(tj::TJPARAM_TJPARAM_PRECISION);
        if bits != 8 {
            return Err(corrupt(format!("a JPEG of {bits} bits a sample; only those of 8 are read")));
        }
        let space = match self.get(tj::TJPARAM_TJPARAM_COLORSPACE) as tj::TJCS {
            tj::TJCS_TJCS_GRAY => Space::Grey,
            tj::TJCS_TJCS_RGB | tj::TJCS_TJCS_YCbCr => Space::Colour,
            tj::TJCS_TJCS_CMYK | tj::TJCS_TJCS_YCCK => Space::Ink,
            other => return Err(corrupt(format!("a JPEG of unknown channels (colour space {other})"))),
        };
        let lossless = self.get(tj::TJPARAM_TJPARAM_LOSSLESS) == 1;
        let unit = if lossless { None } else { unit(self.get(tj::TJPARAM_TJPARAM_SUBSAMP)) };
        Ok(Opened { jpeg: self, bytes, head: Head { width, height, space, unit } })
    }

    fn frame(&mut self, by: u32, region: tj::tjregion) -> Result<()> {
        let scale = tj::tjscalingfactor { num: 1, denom: by as c_int };
        // SAFETY: a live handle, and structures of plain numbers that are checked by the calls.
        let set = unsafe {
            tj::tj3SetScalingFactor(self.handle.as_ptr(), scale) == 0
                && tj::tj3SetCroppingRegion(self.handle.as_ptr(), region) == 0
        };
        if set { Ok(()) } else { Err(corrupt(self.complaint().0)) }
    }
}

impl Drop for Decompressor {
    fn drop(&mut self) {
        // SAFETY: a live handle, not used again.
        unsafe { tj::tj3Destroy(self.handle.as_ptr()) }
    }
}

impl Opened<'_> {
    /// Width and height of the picture at 1/`by` of its size.
    pub fn scaled(&self, by: u32) -> [u32; 2] {
        [self.head.width.div_ceil(by), self.head.height.div_ceil(by)]
    }

    /// The unit of windows at 1/`by` of the size.
    pub fn scaled_unit(&self, by: u32) -> Option<[u32; 2]> {
        self.head.unit.map(|unit| unit.map(|side| side.div_ceil(by)))
    }

    /// Decodes the window (none: everything) at 1/`by` (1, 2, 4, 8) of the size into `out`, which has exactly as many
    /// bytes as that takes. Pixels of the whole at full size are those of Pillow: the exact inverse transform
    /// ("islow") and interpolated chroma. Faults with Code::Corrupt on what is not a sound JPEG; bytes between two
    /// parts of the file that belong to neither, which other readers step over too, are no fault.
    pub fn read(&mut self, pixels: Pixels, by: u32, window: Option<Window>, out: &mut [u8]) -> Result<()> {
        let [width, height] = match window {
            Some(window) => [window.width, window.height],
            None => self.scaled(by),
        };
        assert!([1, 2, 4, 8].contains(&by), "a scale of 1/{by}");
        assert_eq!(out.len(), width as usize * height as usize * pixels.bytes(), "bytes of {width}x{height} pixels");
        let side = |value: u32| c_int::try_from(value).unwrap_or(c_int::MAX);
        let region = match window {
            Some(Window { left, top, width, height }) => {
                // Zeros would mean "everything".
                assert!(width > 0 && height > 0, "an empty window");
                tj::tjregion { x: side(left), y: side(top), w: side(width), h: side(height) }
            }
            None => tj::tjregion { x: 0, y: 0, w: 0, h: 0 },
        };
        self.jpeg.frame(by, region)?;
        self.jpeg.set(tj::TJPARAM_TJPARAM_STOPONWARNING, 1)?;
        let Err((text, warning)) = self.call(pixels, out) else { return Ok(()) };
        if warning && harmless(&text) {
            self.jpeg.set(tj::TJPARAM_TJPARAM_STOPONWARNING, 0)?;
            match self.call(pixels, out) {
                Err((text, warning)) if !(warning && harmless(&text)) => return Err(corrupt(text)),
                _ => return Ok(()),
            }
        }
        Err(corrupt(text))
    }

    fn call(&mut self, pixels: Pixels, out: &mut [u8]) -> std::result::Result<(), (String, bool)> {
        let format = match pixels {
            Pixels::Grey => tj::TJPF_TJPF_GRAY,
            Pixels::Rgb => tj::TJPF_TJPF_RGB,
            Pixels::Cmyk => tj::TJPF_TJPF_CMYK,
        };
        let handle = self.jpeg.handle.as_ptr();
        // SAFETY: a live handle; a pointer with the length of what it points to, borrowed unchanged since its header was
        // read without a fault, so that the picture's size is the one in `head` (of a file without a picture, whose
        // header is no fault, nothing is decoded); and room for every row: `read` has checked the length of `out`
        // against the window, which libjpeg-turbo has accepted, or the scaled size, rows unpadded.
        let done = unsafe {
            tj::tj3Decompress8(handle, self.bytes.as_ptr(), self.bytes.len() as _, out.as_mut_ptr(), 0, format as c_int)
        };
        if done == 0 { Ok(()) } else { Err(self.jpeg.complaint()) }
    }
}

/// Pixels of an interleaved unit (iMCU) by the subsampling of chroma.
fn unit(subsampling: c_int) -> Option<[u32; 2]> {
    match subsampling {
        tj::TJSAMP_TJSAMP_444 | tj::TJSAMP_TJSAMP_GRAY => Some([8, 8]),
        tj::TJSAMP_TJSAMP_422 => Some([16, 8]),
        tj::TJSAMP_TJSAMP_420 => Some([16, 16]),
        tj::TJSAMP_TJSAMP_440 => Some([8, 16]),
        tj::TJSAMP_TJSAMP_411 => Some([32, 8]),
        tj::TJSAMP_TJSAMP_441 => Some([8, 32]),
        _ => None,
    }
}

/// Warnings about files that are unusual, not damaged.
fn harmless(warning: &str) -> bool {
    ["extraneous bytes before marker", "unknown JFIF revision", "Unknown Adobe color", "Invalid SOS parameters"]
        .iter()
        .any(|known| warning.contains(known))
}

fn corrupt(why: impl std::fmt::Display) -> Fault {
    Fault::new(Code::Corrupt, format!("not a JPEG that can be decoded: {why}"))
}
