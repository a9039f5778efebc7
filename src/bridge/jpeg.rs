//! A safe interface to the decompressor of libjpeg-turbo (TurboJPEG 3): the header of a JPEG, and its pixels, all of
//! them or a crop, at full size or at 1/2, 1/4 or 1/8 of it.

use crate::error::{Error, ExitCode, Result};
use std::ffi::{CStr, c_int, c_void};
use std::ptr::NonNull;
use turbojpeg_sys as tj;

/// A decompressor, which is reused from image to image.
pub struct Decompressor {
    handle: NonNull<c_void>,
    limits: JpegLimits,
}

// SAFETY: the handle is owned by this value alone, and libjpeg-turbo does not tie it to a thread.
unsafe impl Send for Decompressor {}

/// Limits that a JPEG must not exceed.
#[derive(Clone, Copy, Debug)]
pub struct JpegLimits {
    pub max_pixels: u64,
    /// Maximum number of scans of a progressive JPEG.
    pub max_scans: u32,
    /// Maximum bytes of coefficients and other working memory.
    pub max_memory: u64,
}

/// Color space of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ColorSpace {
    Gray,
    /// RGB or YCbCr: three channels.
    Color,
    /// CMYK or YCCK: four channels.
    Cmyk,
}

/// Format of the decoded pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PixelFormat {
    Gray,
    Rgb,
    /// Values as stored; Adobe's files store 255 − ink.
    Cmyk,
}

impl PixelFormat {
    /// Returns the bytes of one pixel.
    pub fn bytes_per_pixel(self) -> usize {
        match self {
            PixelFormat::Gray => 1,
            PixelFormat::Rgb => 3,
            PixelFormat::Cmyk => 4,
        }
    }
}

/// Header of a JPEG.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JpegHeader {
    pub width: u32,
    pub height: u32,
    pub color_space: ColorSpace,
    /// Width and height of a block (iMCU), the alignment of crops, in pixels; `None` if the file cannot be cropped.
    pub mcu_size: Option<[u32; 2]>,
}

/// A crop in pixels of the scaled image. `left` must be a multiple of the scaled block width.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CropRegion {
    pub left: u32,
    pub top: u32,
    pub width: u32,
    pub height: u32,
}

/// A JPEG after its header was read.
pub struct JpegReader<'a> {
    decompressor: &'a mut Decompressor,
    bytes: &'a [u8],
    pub header: JpegHeader,
}

/// Error text of libjpeg-turbo, and whether it is only a warning.
struct Complaint {
    text: String,
    warning: bool,
}

impl Complaint {
    /// Returns whether this is a warning about a file that is unusual but not damaged.
    fn is_harmless(&self) -> bool {
        const HARMLESS: [&str; 4] = [
            "extraneous bytes before marker",
            "unknown JFIF revision",
            "Unknown Adobe color",
            "Invalid SOS parameters",
        ];
        self.warning && HARMLESS.iter().any(|known| self.text.contains(known))
    }
}

impl Decompressor {
    /// Creates a decompressor with these limits.
    pub fn new(limits: JpegLimits) -> Result<Decompressor> {
        // SAFETY: the call takes no pointer; a null handle is refused below.
        let handle = unsafe { tj::tj3Init(tj::TJINIT_TJINIT_DECOMPRESS as c_int) };
        let Some(handle) = NonNull::new(handle) else {
            return Err(Error::failed("libjpeg-turbo does not start: no memory for a decompressor"));
        };
        let mut decompressor = Decompressor { handle, limits };
        decompressor.set(tj::TJPARAM_TJPARAM_MAXPIXELS, saturate(limits.max_pixels))?;
        decompressor.set(tj::TJPARAM_TJPARAM_SCANLIMIT, saturate(limits.max_scans.into()))?;
        decompressor.set(tj::TJPARAM_TJPARAM_MAXMEMORY, saturate(limits.max_memory.div_ceil(1 << 20)))?;
        // Color profiles and comments are not needed.
        decompressor.set(tj::TJPARAM_TJPARAM_SAVEMARKERS, 0)?;
        Ok(decompressor)
    }

    fn set(&mut self, parameter: tj::TJPARAM, value: c_int) -> Result<()> {
        // SAFETY: a live handle; the other two are plain numbers.
        match unsafe { tj::tj3Set(self.handle.as_ptr(), parameter as c_int, value) } {
            0 => Ok(()),
            _ => Err(Error::failed(format!("libjpeg-turbo does not accept {value} for parameter {parameter}"))),
        }
    }

    fn get(&self, parameter: tj::TJPARAM) -> c_int {
        // SAFETY: a live handle; the other is a plain number.
        unsafe { tj::tj3Get(self.handle.as_ptr(), parameter as c_int) }
    }

    /// Returns the error of the last call that failed.
    fn last_complaint(&self) -> Complaint {
        // SAFETY: a live handle; the text is a C string that lives until the handle's next call, and is copied here.
        let text = unsafe { CStr::from_ptr(tj::tj3GetErrorStr(self.handle.as_ptr())) }.to_string_lossy().into_owned();
        // SAFETY: a live handle.
        let code = unsafe { tj::tj3GetErrorCode(self.handle.as_ptr()) };
        Complaint { text, warning: code == tj::TJERR_TJERR_WARNING as c_int }
    }

    /// Reads the header of a JPEG.
    ///
    /// # Errors
    /// [`ExitCode::Corrupt`] if there is no valid header, or if the file has other than 8 bits per sample or an unknown
    /// color space.
    pub fn read_header<'a>(&'a mut self, bytes: &'a [u8]) -> Result<JpegReader<'a>> {
        self.set(tj::TJPARAM_TJPARAM_STOPONWARNING, 0)?;
        // SAFETY: a live handle, and a pointer with the length of what it points to; nothing is kept of it.
        let status = unsafe { tj::tj3DecompressHeader(self.handle.as_ptr(), bytes.as_ptr(), bytes.len() as _) };
        if status != 0 {
            // A warning (an unknown version of JFIF) leaves the header read. An error after a warning still has the
            // code of a warning, but its own text.
            let complaint = self.last_complaint();
            if !complaint.is_harmless() {
                // A fresh handle: this one would continue the next image where this one broke off.
                *self = Decompressor::new(self.limits)?;
                return Err(corrupt(complaint.text));
            }
        }
        let width = u32::try_from(self.get(tj::TJPARAM_TJPARAM_JPEGWIDTH)).unwrap_or(0);
        let height = u32::try_from(self.get(tj::TJPARAM_TJPARAM_JPEGHEIGHT)).unwrap_or(0);
        if width == 0 || height == 0 {
            return Err(corrupt("a JPEG of no pixels"));
        }
        let bits = self.get(tj::TJPARAM_TJPARAM_PRECISION);
        if bits != 8 {
            return Err(corrupt(format!("a JPEG of {bits} bits per sample; only 8 are supported")));
        }
        let color_space = match self.get(tj::TJPARAM_TJPARAM_COLORSPACE) as tj::TJCS {
            tj::TJCS_TJCS_GRAY => ColorSpace::Gray,
            tj::TJCS_TJCS_RGB | tj::TJCS_TJCS_YCbCr => ColorSpace::Color,
            tj::TJCS_TJCS_CMYK | tj::TJCS_TJCS_YCCK => ColorSpace::Cmyk,
            other => return Err(corrupt(format!("a JPEG of unknown channels (color space {other})"))),
        };
        let lossless = self.get(tj::TJPARAM_TJPARAM_LOSSLESS) == 1;
        let mcu_size = if lossless { None } else { mcu_size(self.get(tj::TJPARAM_TJPARAM_SUBSAMP)) };
        Ok(JpegReader { decompressor: self, bytes, header: JpegHeader { width, height, color_space, mcu_size } })
    }

    fn set_scale_and_crop(&mut self, denominator: u32, region: tj::tjregion) -> Result<()> {
        let scale = tj::tjscalingfactor { num: 1, denom: denominator as c_int };
        // SAFETY: a live handle, and structures of plain numbers that are checked by the calls.
        let accepted = unsafe {
            tj::tj3SetScalingFactor(self.handle.as_ptr(), scale) == 0
                && tj::tj3SetCroppingRegion(self.handle.as_ptr(), region) == 0
        };
        if accepted { Ok(()) } else { Err(corrupt(self.last_complaint().text)) }
    }
}

impl Drop for Decompressor {
    fn drop(&mut self) {
        // SAFETY: a live handle, not used again.
        unsafe { tj::tj3Destroy(self.handle.as_ptr()) }
    }
}

impl JpegReader<'_> {
    /// Returns the width and height of the image at 1/`denominator` of its size.
    pub fn scaled_size(&self, denominator: u32) -> [u32; 2] {
        [self.header.width.div_ceil(denominator), self.header.height.div_ceil(denominator)]
    }

    /// Returns the block size (the alignment of crops) at 1/`denominator` of the size.
    pub fn scaled_mcu_size(&self, denominator: u32) -> Option<[u32; 2]> {
        self.header.mcu_size.map(|size| size.map(|side| side.div_ceil(denominator)))
    }

    /// Decodes the image, or only `crop` of it, at 1/`denominator` (1, 2, 4, 8) of its size into `out`. Pixels of the
    /// whole image at full size equal Pillow's: the accurate inverse transform ("islow") and interpolated chroma.
    ///
    /// # Errors
    /// [`ExitCode::Corrupt`] if the file is damaged. Stray bytes between segments, which other readers skip too, are
    /// accepted.
    ///
    /// # Panics
    /// If the length of `out` is not that of the decoded pixels, or `crop` is empty.
    pub fn decode(
        &mut self,
        format: PixelFormat,
        denominator: u32,
        crop: Option<CropRegion>,
        out: &mut [u8],
    ) -> Result<()> {
        let [width, height] = crop.map_or_else(|| self.scaled_size(denominator), |crop| [crop.width, crop.height]);
        assert!([1, 2, 4, 8].contains(&denominator), "a scale of 1/{denominator}");
        assert_eq!(out.len(), width as usize * height as usize * format.bytes_per_pixel(), "bytes of {width}x{height}");
        let region = match crop {
            Some(CropRegion { left, top, width, height }) => {
                // Zeros would mean "everything".
                assert!(width > 0 && height > 0, "an empty crop");
                let [x, y, w, h] = [left, top, width, height].map(|side| saturate(side.into()));
                tj::tjregion { x, y, w, h }
            }
            None => tj::tjregion { x: 0, y: 0, w: 0, h: 0 },
        };
        self.decompressor.set_scale_and_crop(denominator, region)?;
        self.decompressor.set(tj::TJPARAM_TJPARAM_STOPONWARNING, 1)?;
        let Err(complaint) = self.decompress(format, out) else { return Ok(()) };
        if !complaint.is_harmless() {
            return Err(corrupt(complaint.text));
        }
        self.decompressor.set(tj::TJPARAM_TJPARAM_STOPONWARNING, 0)?;
        match self.decompress(format, out) {
            Err(complaint) if !complaint.is_harmless() => Err(corrupt(complaint.text)),
            _ => Ok(()),
        }
    }

    fn decompress(&mut self, format: PixelFormat, out: &mut [u8]) -> std::result::Result<(), Complaint> {
        let format = match format {
            PixelFormat::Gray => tj::TJPF_TJPF_GRAY,
            PixelFormat::Rgb => tj::TJPF_TJPF_RGB,
            PixelFormat::Cmyk => tj::TJPF_TJPF_CMYK,
        };
        let handle = self.decompressor.handle.as_ptr();
        // SAFETY: a live handle; a pointer with the length of what it points to, borrowed unchanged since its header
        // was read successfully, so that the image's size is the one in `header` (of a file without an image, whose
        // header is valid, nothing is decoded); and room for every row: `decode` has checked the length of `out`
        // against the crop, which libjpeg-turbo has accepted, or the scaled size, rows unpadded.
        let status = unsafe {
            tj::tj3Decompress8(handle, self.bytes.as_ptr(), self.bytes.len() as _, out.as_mut_ptr(), 0, format as c_int)
        };
        if status == 0 { Ok(()) } else { Err(self.decompressor.last_complaint()) }
    }
}

/// Converts to a C int; values out of range become its maximum.
fn saturate(value: u64) -> c_int {
    c_int::try_from(value).unwrap_or(c_int::MAX)
}

/// Returns the width and height of an interleaved block (iMCU) for a chroma subsampling.
fn mcu_size(subsampling: c_int) -> Option<[u32; 2]> {
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

fn corrupt(reason: impl std::fmt::Display) -> Error {
    Error::new(ExitCode::Corrupt, format!("not a JPEG that can be decoded: {reason}"))
}
