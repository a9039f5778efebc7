//! The few things that ffmpeg-next leaves out: colours as the frame says they are, part of a frame, packets that are
//! decoded and not shown, and a stream's size ahead of decoding. And the closing of descriptors that nobody here owns.

use ffmpeg_next::codec::Parameters;
use ffmpeg_next::ffi;
use ffmpeg_next::format::Pixel;
use ffmpeg_next::packet::{Packet, Ref};
use ffmpeg_next::software::scaling::{Context, Flags};
use ffmpeg_next::util::frame::Video as Frame;

/// Closes all descriptors but standard input, output and error: those that this process's parent, and its parents, had
/// open and let it inherit. To be called before anything here has opened one.
pub fn close_inherited() -> std::io::Result<()> {
    let numbers = |entry: std::io::Result<std::fs::DirEntry>| entry.ok()?.file_name().to_str()?.parse().ok();
    let open: Vec<i32> = std::fs::read_dir("/proc/self/fd")?.filter_map(numbers).collect();
    for number in open.into_iter().filter(|&number| number > 2) {
        // SAFETY: nothing in this process has a descriptor yet but those below; the folder that was just read is closed
        // already, and to close its number again does nothing.
        unsafe { rustix::io::close(number) };
    }
    Ok(())
}

/// Whether an edit list says that the packet's frame is not shown.
pub fn hidden(packet: &Packet) -> bool {
    // SAFETY: the packet lives as long as it is borrowed.
    unsafe { (*packet.as_ptr()).flags & ffi::AV_PKT_FLAG_DISCARD != 0 }
}

/// Width and height of a stream's frames as its container says; 0 where it does not.
pub fn size(parameters: &Parameters) -> [u32; 2] {
    // SAFETY: the parameters live as long as they are borrowed.
    let [width, height] = unsafe { [(*parameters.as_ptr()).width, (*parameters.as_ptr()).height] };
    [width, height].map(|side| u32::try_from(side).unwrap_or(0))
}

/// Converts part of frames of one kind to RGB, 8 bits.
pub struct ToRgb {
    context: Context,
    kind: Kind,
}

/// What a conversion depends on.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Kind {
    format: Pixel,
    space: i32,
    full: bool,
    from: [u32; 2],
    to: [u32; 2],
}

impl ToRgb {
    /// The region [left, top, width, height] of `frame`, of even left and top and inside of it, at the size of `out`.
    /// `kept` is what the last call made; it serves again where the frames are alike.
    pub fn convert(
        kept: &mut Option<ToRgb>,
        frame: &Frame,
        [left, top, width, height]: [u32; 4],
        out: &mut Frame,
    ) -> Result<(), String> {
        assert!(
            left.is_multiple_of(2)
                && top.is_multiple_of(2)
                && left + width <= frame.width()
                && top + height <= frame.height()
        );
        assert!(out.format() == Pixel::RGB24);
        // SAFETY: the frame lives as long as it is borrowed.
        let (space, range) = unsafe { ((*frame.as_ptr()).colorspace as i32, (*frame.as_ptr()).color_range) };
        let full = range == ffi::AVColorRange::AVCOL_RANGE_JPEG;
        let to = [out.width(), out.height()];
        let kind = Kind { format: frame.format(), space, full, from: [width, height], to };
        if kept.as_ref().is_none_or(|kept| kept.kind != kind) {
            *kept = Some(ToRgb { context: context(&kind)?, kind });
        }
        let kept = kept.as_mut().expect("made above");
        let (planes, strides) = planes(frame, left, top)?;
        // SAFETY: each plane is the frame's own, moved to the region's first pixel; width and height end inside of the
        // frame, and `out` has the size that the context was made for.
        let rows = unsafe {
            ffi::sws_scale(
                kept.context.as_mut_ptr(),
                planes.as_ptr(),
                strides.as_ptr(),
                0,
                height as i32,
                (*out.as_mut_ptr()).data.as_ptr(),
                (*out.as_mut_ptr()).linesize.as_ptr(),
            )
        };
        if rows == to[1] as i32 { Ok(()) } else { Err(format!("{rows} of {} rows were converted", to[1])) }
    }
}

/// Bilinear, which spans all source pixels where it makes frames smaller; colours by the frame's own matrix and range,
/// ITU-R 601 where it says none.
fn context(kind: &Kind) -> Result<Context, String> {
    let Kind { format, from, to, .. } = *kind;
    let context = Context::get(format, from[0], from[1], Pixel::RGB24, to[0], to[1], Flags::BILINEAR);
    let mut context = context.map_err(|error| format!("frames of {format:?} cannot be converted: {error}"))?;
    // The formats whose name says it are of full range whatever the frame says.
    let full = kind.full || matches!(format, Pixel::YUVJ420P | Pixel::YUVJ422P | Pixel::YUVJ444P | Pixel::YUVJ440P);
    // SAFETY: the context is valid, and the tables of coefficients are FFmpeg's own and stay.
    unsafe {
        let matrix = ffi::sws_getCoefficients(kind.space);
        let (one, zero) = (1 << 16, 0);
        // It answers -1 for formats that have no such matrix, which then need none.
        ffi::sws_setColorspaceDetails(context.as_mut_ptr(), matrix, i32::from(full), matrix, 1, zero, one, one);
    }
    Ok(context)
}

/// The planes of a frame from a pixel on, and the bytes of their rows.
fn planes(frame: &Frame, left: u32, top: u32) -> Result<([*const u8; 4], [i32; 4]), String> {
    let Some(descriptor) = frame.format().descriptor() else {
        return Err(format!("frames of {:?} cannot be converted", frame.format()));
    };
    let (across, down) = (descriptor.log2_chroma_w(), descriptor.log2_chroma_h());
    let (mut planes, mut strides) = ([std::ptr::null(); 4], [0; 4]);
    // SAFETY: the descriptor is a table of FFmpeg's; a plane that a component names is there, and the pixel lies inside
    // of the frame.
    unsafe {
        let (frame, table) = (frame.as_ptr(), &*descriptor.as_ptr());
        for number in 0..4 {
            planes[number] = (*frame).data[number].cast_const();
            strides[number] = (*frame).linesize[number];
        }
        let mut moved = [false; 4];
        for (number, component) in table.comp.iter().take(usize::from(table.nb_components)).enumerate() {
            let plane = component.plane as usize;
            if std::mem::replace(&mut moved[plane], true) {
                continue;
            }
            let chroma = number == 1 || number == 2;
            let (x, y) = if chroma { (left >> across, top >> down) } else { (left, top) };
            let offset = x as isize * component.step as isize + y as isize * strides[plane] as isize;
            planes[plane] = planes[plane].offset(offset);
        }
    }
    Ok((planes, strides))
}
