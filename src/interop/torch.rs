//! The objects that the pickle of a PyTorch checkpoint may build: plain data, ordered dictionaries, strided views of
//! storages, and inert argument objects. Every other global name is rejected before it has any effect.

use tch::Kind;

/// Index of a node.
pub type NodeId = usize;

/// A value described by a pickle.
#[derive(Clone, Debug)]
pub enum Node {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
    Tuple(Vec<NodeId>),
    List(Vec<NodeId>),
    Dict(Vec<(NodeId, NodeId)>),
    /// A global name of the allow-list.
    Global(Global),
    Storage(Storage),
    Tensor(StridedView),
    /// An object that is not interpreted, with its state.
    Object(Option<NodeId>),
}

/// A global name of the allow-list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Global {
    OrderedDict,
    /// `torch._utils._rebuild_tensor_v2`.
    RebuildTensor,
    /// `torch._utils._rebuild_parameter`.
    RebuildParameter,
    /// A storage class, by the dtype of its elements.
    StorageClass(Kind),
    /// Classes of arguments and paths that training scripts save with the weights; their instances stay uninterpreted.
    Inert,
}

/// A flat run of elements, stored as one member of the archive.
#[derive(Clone, Debug)]
pub struct Storage {
    /// Dtype of the elements.
    pub kind: Kind,
    /// Key of the member `data/<key>`.
    pub key: String,
    /// Number of elements.
    pub count: i64,
}

/// A tensor as a strided view of a storage. It is checked to stay inside the storage and to have no more elements than
/// the storage.
#[derive(Clone, Debug)]
pub struct StridedView {
    pub storage: Storage,
    /// Index of the first element in the storage.
    pub offset: i64,
    pub size: Vec<i64>,
    /// Strides in elements.
    pub stride: Vec<i64>,
}

/// Resolves a global name.
pub fn find_global(module: &str, name: &str) -> Result<Global, String> {
    Ok(match (module, name) {
        ("collections", "OrderedDict") => Global::OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2") => Global::RebuildTensor,
        ("torch._utils", "_rebuild_parameter") => Global::RebuildParameter,
        ("argparse", "Namespace") | ("pathlib", "PosixPath" | "WindowsPath") => Global::Inert,
        ("torch", "FloatStorage") => Global::StorageClass(Kind::Float),
        ("torch", "HalfStorage") => Global::StorageClass(Kind::Half),
        ("torch", "BFloat16Storage") => Global::StorageClass(Kind::BFloat16),
        ("torch", "DoubleStorage") => Global::StorageClass(Kind::Double),
        ("torch", "LongStorage") => Global::StorageClass(Kind::Int64),
        ("torch", "IntStorage") => Global::StorageClass(Kind::Int),
        ("torch", "ShortStorage") => Global::StorageClass(Kind::Int16),
        ("torch", "CharStorage") => Global::StorageClass(Kind::Int8),
        ("torch", "ByteStorage") => Global::StorageClass(Kind::Uint8),
        ("torch", "BoolStorage") => Global::StorageClass(Kind::Bool),
        _ => {
            let full_name: String = format!("{module}.{name}").chars().take(80).collect();
            return Err(format!("it refers to {full_name:?}, which a state dict does not need; nothing was executed"));
        }
    })
}

/// Returns the result of calling a global (the opcodes REDUCE and NEWOBJ).
pub fn call(nodes: &[Node], callable: NodeId, arguments: NodeId) -> Result<Node, String> {
    let Node::Tuple(arguments) = &nodes[arguments] else { return Err("it calls something without arguments".into()) };
    match (&nodes[callable], &arguments[..]) {
        (Node::Global(Global::OrderedDict), []) => Ok(Node::Dict(Vec::new())),
        (Node::Global(Global::OrderedDict), [items]) => ordered_dict(nodes, *items),
        (Node::Global(Global::RebuildTensor), [storage, offset, size, stride, ..]) => {
            strided_view(nodes, *storage, *offset, *size, *stride).map(Node::Tensor)
        }
        (Node::Global(Global::RebuildParameter), [tensor, ..]) => match &nodes[*tensor] {
            Node::Tensor(view) => Ok(Node::Tensor(view.clone())),
            _ => Err("it has a parameter that is not a tensor".into()),
        },
        (Node::Global(Global::Inert), _) => Ok(Node::Object(None)),
        _ => Err("it calls something that cannot be called, or with too few arguments".into()),
    }
}

/// Builds an ordered dictionary from a list of pairs.
fn ordered_dict(nodes: &[Node], items: NodeId) -> Result<Node, String> {
    let Node::List(items) = &nodes[items] else {
        return Err("it builds an ordered dictionary from something other than a list".into());
    };
    let pair = |item: &NodeId| match &nodes[*item] {
        Node::Tuple(pair) | Node::List(pair) if pair.len() == 2 => Ok((pair[0], pair[1])),
        _ => Err("it builds an ordered dictionary from something other than pairs".to_owned()),
    };
    Ok(Node::Dict(items.iter().map(pair).collect::<Result<_, _>>()?))
}

/// Returns the storage of a persistent id ("storage", class, key, device, number of elements).
pub fn persistent_load(nodes: &[Node], id: NodeId) -> Result<Node, String> {
    let Node::Tuple(parts) = &nodes[id] else { return Err("it has a storage without a name".into()) };
    let parts: Vec<&Node> = parts.iter().map(|&part| &nodes[part]).collect();
    match parts[..] {
        [
            Node::Text(tag),
            Node::Global(Global::StorageClass(kind)),
            Node::Text(key),
            Node::Text(_),
            Node::Int(count),
        ] if tag == "storage" && *count >= 0 => {
            Ok(Node::Storage(Storage { kind: *kind, key: key.clone(), count: *count }))
        }
        _ => Err("it describes a storage in an unknown way".into()),
    }
}

fn strided_view(
    nodes: &[Node],
    storage: NodeId,
    offset: NodeId,
    size: NodeId,
    stride: NodeId,
) -> Result<StridedView, String> {
    let (Node::Storage(storage), Node::Int(offset)) = (&nodes[storage], &nodes[offset]) else {
        return Err("it has a tensor without a storage".into());
    };
    let size = integers(nodes, size)?;
    let stride = integers(nodes, stride)?;
    let outside = || "it has a tensor that reaches beyond its storage".to_owned();
    if size.len() != stride.len() || size.len() > 8 || size.iter().chain(&stride).any(|&n| n < 0) || *offset < 0 {
        return Err("it has a tensor of an impossible shape".into());
    }
    let elements = size.iter().try_fold(1i64, |product, &n| product.checked_mul(n)).ok_or_else(outside)?;
    let last = size
        .iter()
        .zip(&stride)
        .try_fold(*offset, |index, (&n, &step)| index.checked_add((n - 1).max(0).checked_mul(step)?))
        .ok_or_else(outside)?;
    // A stride of 0 could expand one element to a terabyte.
    if elements > storage.count || *offset > storage.count || (elements > 0 && last >= storage.count) {
        return Err(outside());
    }
    Ok(StridedView { storage: storage.clone(), offset: *offset, size, stride })
}

fn integers(nodes: &[Node], id: NodeId) -> Result<Vec<i64>, String> {
    let Node::Tuple(items) = &nodes[id] else { return Err("it has a tensor without a shape".into()) };
    let integer = |&item: &NodeId| match nodes[item] {
        Node::Int(n) => Ok(n),
        _ => Err("it has a tensor whose shape is not made of integers".to_owned()),
    };
    items.iter().map(integer).collect()
}

/// Sets the state of an object (the opcode BUILD). The state of a dictionary, `_metadata` of a state dict, is ignored.
pub fn build(nodes: &mut [Node], object: NodeId, state: NodeId) -> Result<(), String> {
    match &mut nodes[object] {
        Node::Object(attributes) => *attributes = Some(state),
        Node::Dict(_) => {}
        _ => return Err("it sets attributes of a value that has none".into()),
    }
    Ok(())
}
