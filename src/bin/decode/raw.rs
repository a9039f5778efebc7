//! Parts of FFmpeg that ffmpeg-next does not expose: colors as the frame describes them, crops, packets that are
//! decoded but not shown, and a stream's size before decoding. Also closes inherited file descriptors.

use ffmpeg_next::codec::Parameters;
use ffmpeg_next::ffi;
use ffmpeg_next::format::Pixel;
use ffmpeg_next::packet::{Packet, Ref};
use ffmpeg_next::software::scaling::{Context, Flags};
use ffmpeg_next::util::frame::Video as Frame;

/// Closes all file descriptors but standard input, output and error: those that this process inherited. Must be called
/// before this process opens any.
pub fn close_inherited_fds() -> std::io::Result<()> {
    let descriptor = |entry: std::io::Result<std::fs::DirEntry>| entry.ok()?.file_name().to_str()?.parse().ok();
    let open: Vec<i32> = std::fs::read_dir("/proc/self/fd")?.filter_map(descriptor).collect();
    for descriptor in open.into_iter().filter(|&descriptor| descriptor > 2) {
        // SAFETY: nothing in this process has a descriptor yet but those below 3; the folder that was just read is
        // closed already, and closing its descriptor again does nothing.
        unsafe { rustix::io::close(descriptor) };
    }
    Ok(())
}

/// Returns whether an edit list says that the packet's frame is not shown.
pub fn is_discarded(packet: &Packet) -> bool {
    // SAFETY: the packet lives as long as it is borrowed.
    unsafe { (*packet.as_ptr()).flags & ffi::AV_PKT_FLAG_DISCARD != 0 }
}

/// Returns the width and height of a stream's frames according to its container; 0 if unknown.
pub fn coded_size(parameters: &Parameters) -> [u32; 2] {
    // SAFETY: the parameters live as long as they are borrowed.
    let size = unsafe { [(*parameters.as_ptr()).width, (*parameters.as_ptr()).height] };
    size.map(|side| u32::try_from(side).unwrap_or(0))
}

/// Converts crops of similar frames to 8-bit RGB.
pub struct RgbConverter {
    context: Context,
    key: ConversionKey,
}

/// The properties that a scaling context depends on.
#[derive(Clone, Copy, PartialEq, Eq)]
struct ConversionKey {
    format: Pixel,
    color_space: i32,
    full_range: bool,
    from: [u32; 2],
    to: [u32; 2],
}

impl RgbConverter {
    /// Converts the region [left, top, width, height] of `frame` to the size of `out`. The region must be inside the
    /// frame, with an even left and top. `cached` is reused while the frames have the same properties.
    pub fn convert(
        cached: &mut Option<RgbConverter>,
        frame: &Frame,
        [left, top, width, height]: [u32; 4],
        out: &mut Frame,
    ) -> Result<(), String> {
        assert!(left.is_multiple_of(2) && top.is_multiple_of(2), "a region with an odd corner");
        assert!(left + width <= frame.width() && top + height <= frame.height(), "a region outside of the frame");
        assert!(out.format() == Pixel::RGB24);
        // SAFETY: the frame lives as long as it is borrowed.
        let color_space = unsafe { (*frame.as_ptr()).colorspace as i32 };
        // SAFETY: as above.
        let range = unsafe { (*frame.as_ptr()).color_range };
        let full_range = range == ffi::AVColorRange::AVCOL_RANGE_JPEG;
        let to = [out.width(), out.height()];
        let key = ConversionKey { format: frame.format(), color_space, full_range, from: [width, height], to };
        if cached.as_ref().is_none_or(|cached| cached.key != key) {
            *cached = Some(RgbConverter { context: scaling_context(&key)?, key });
        }
        let converter = cached.as_mut().expect("made above");
        let planes = Planes::new(frame, left, top)?;
        // SAFETY: each plane is the frame's own, offset to the region's first pixel; width and height end inside of the
        // frame, and `out` has the size that the context was made for.
        let rows = unsafe {
            ffi::sws_scale(
                converter.context.as_mut_ptr(),
                planes.data.as_ptr(),
                planes.strides.as_ptr(),
                0,
                height as i32,
                (*out.as_mut_ptr()).data.as_ptr(),
                (*out.as_mut_ptr()).linesize.as_ptr(),
            )
        };
        if rows == to[1] as i32 { Ok(()) } else { Err(format!("{rows} of {} rows were converted", to[1])) }
    }
}

/// Creates a bilinear scaling context, which averages all source pixels when it downscales. Colors are converted by the
/// frame's own matrix and range; the default is ITU-R 601.
fn scaling_context(key: &ConversionKey) -> Result<Context, String> {
    let ConversionKey { format, from, to, .. } = *key;
    let context = Context::get(format, from[0], from[1], Pixel::RGB24, to[0], to[1], Flags::BILINEAR);
    let mut context = context.map_err(|error| format!("frames of {format:?} cannot be converted: {error}"))?;
    // These formats have full range by definition, whatever the frame says.
    let full_range =
        key.full_range || matches!(format, Pixel::YUVJ420P | Pixel::YUVJ422P | Pixel::YUVJ444P | Pixel::YUVJ440P);
    let one = 1 << 16;
    // SAFETY: the context is valid, and the tables of coefficients are FFmpeg's own and stay. Returns -1 for formats
    // without such a matrix, which need none.
    unsafe {
        let matrix = ffi::sws_getCoefficients(key.color_space);
        ffi::sws_setColorspaceDetails(context.as_mut_ptr(), matrix, i32::from(full_range), matrix, 1, 0, one, one);
    }
    Ok(context)
}

/// The planes of a frame from a pixel on, and the bytes per row.
struct Planes {
    data: [*const u8; 4],
    strides: [i32; 4],
}

impl Planes {
    fn new(frame: &Frame, left: u32, top: u32) -> Result<Planes, String> {
        let Some(descriptor) = frame.format().descriptor() else {
            return Err(format!("frames of {:?} cannot be converted", frame.format()));
        };
        let chroma_x = left >> descriptor.log2_chroma_w();
        let chroma_y = top >> descriptor.log2_chroma_h();
        let mut planes = Planes { data: [std::ptr::null(); 4], strides: [0; 4] };
        // SAFETY: the descriptor is a table of FFmpeg's; a plane that a component names exists, and the pixel is inside
        // of the frame.
        unsafe {
            let frame = frame.as_ptr();
            let descriptor = &*descriptor.as_ptr();
            for plane in 0..4 {
                planes.data[plane] = (*frame).data[plane].cast_const();
                planes.strides[plane] = (*frame).linesize[plane];
            }
            let mut is_offset = [false; 4];
            let components = descriptor.comp.iter().take(usize::from(descriptor.nb_components));
            for (index, component) in components.enumerate() {
                let plane = component.plane as usize;
                if std::mem::replace(&mut is_offset[plane], true) {
                    continue;
                }
                let is_chroma = index == 1 || index == 2;
                let (x, y) = if is_chroma { (chroma_x, chroma_y) } else { (left, top) };
                let offset = x as isize * component.step as isize + y as isize * planes.strides[plane] as isize;
                planes.data[plane] = planes.data[plane].offset(offset);
            }
        }
        Ok(planes)
    }
}
