//! Functions that do more than pass a call on: those that open and close sessions, and those that may lie.

use crate::engine::{Shim, forward};
use cryptoki_sys::{
    CK_ATTRIBUTE, CK_BBOOL, CK_FLAGS, CK_NOTIFY, CK_OBJECT_HANDLE, CK_RV, CK_SESSION_HANDLE,
    CK_SLOT_ID, CK_TOKEN_INFO, CK_ULONG, CK_UNAVAILABLE_INFORMATION, CKR_ATTRIBUTE_SENSITIVE,
    CKR_BUFFER_TOO_SMALL, CKR_OK, CKR_SESSION_COUNT, CKR_SESSION_HANDLE_INVALID,
};
use std::ffi::c_void;

pub(crate) fn finalize(shim: &Shim, reserved: *mut c_void) -> CK_RV {
    // SAFETY: the application's own argument.
    let code = forward(shim.real().C_Finalize, |finalize| unsafe { finalize(reserved) });
    forget_sessions(shim, code)
}

pub(crate) fn close_all_sessions(shim: &Shim, slot: CK_SLOT_ID) -> CK_RV {
    // SAFETY: a number is all that the function takes.
    let code = forward(shim.real().C_CloseAllSessions, |close| unsafe { close(slot) });
    forget_sessions(shim, code)
}

pub(crate) fn open_session(
    shim: &Shim,
    slot: CK_SLOT_ID,
    flags: CK_FLAGS,
    application: *mut c_void,
    notify: CK_NOTIFY,
    session: *mut CK_SESSION_HANDLE,
) -> CK_RV {
    let full = |shim: &Shim| {
        let state = shim.state();
        state.orders.most_sessions.is_some_and(|most| state.open.len() >= most)
    };
    if full(shim) {
        return CKR_SESSION_COUNT;
    }
    // SAFETY: the application's own arguments.
    let code = forward(shim.real().C_OpenSession, |open| unsafe {
        open(slot, flags, application, notify, session)
    });
    if code == CKR_OK {
        let mut state = shim.state();
        // SAFETY: the module has just written the handle there.
        state.open.insert(unsafe { *session });
        shim.note_sessions(&state);
    }
    code
}

pub(crate) fn close_session(shim: &Shim, session: CK_SESSION_HANDLE) -> CK_RV {
    // The real one is closed in any case: a session that died holds nothing in the token.
    // SAFETY: a number is all that the function takes.
    let code = forward(shim.real().C_CloseSession, |close| unsafe { close(session) });
    let mut state = shim.state();
    state.pending.remove(&session);
    state.open.remove(&session);
    shim.note_sessions(&state);
    if state.dead.remove(&session) { CKR_SESSION_HANDLE_INVALID } else { code }
}

pub(crate) fn slot_list(
    shim: &Shim,
    with_token: CK_BBOOL,
    slots: *mut CK_SLOT_ID,
    count: *mut CK_ULONG,
) -> CK_RV {
    let gone = shim.state().orders.token_gone;
    if gone && with_token != 0 && !count.is_null() {
        // SAFETY: the application's place for a number.
        unsafe { *count = 0 };
        return CKR_OK;
    }
    // SAFETY: the application's own arguments.
    forward(shim.real().C_GetSlotList, |list| unsafe { list(with_token, slots, count) })
}

pub(crate) fn token_info(shim: &Shim, slot: CK_SLOT_ID, info: *mut CK_TOKEN_INFO) -> CK_RV {
    // SAFETY: the application's own arguments.
    let code = forward(shim.real().C_GetTokenInfo, |token| unsafe { token(slot, info) });
    let orders = shim.state().orders.clone();
    if code == CKR_OK
        && let Some(serial) = &orders.serial
    {
        // SAFETY: the module has just filled this structure.
        let field = unsafe { &mut (*info).serialNumber };
        field.fill(b' ');
        field.iter_mut().zip(serial.bytes()).for_each(|(to, from)| *to = from);
    }
    code
}

/// Where each object is to be seen twice, the module is asked for half as many as there is room for.
pub(crate) fn find_objects(
    shim: &Shim,
    session: CK_SESSION_HANDLE,
    objects: *mut CK_OBJECT_HANDLE,
    room: CK_ULONG,
    count: *mut CK_ULONG,
) -> CK_RV {
    let twice = shim.state().orders.objects_twice && room > 1;
    let asked = if twice { room / 2 } else { room };
    // SAFETY: the application's own arguments, with room for at least as many.
    let code =
        forward(shim.real().C_FindObjects, |find| unsafe { find(session, objects, asked, count) });
    if code == CKR_OK && twice && !objects.is_null() && !count.is_null() {
        // SAFETY: the module has just written the number there.
        let found = usize::try_from(unsafe { *count }).unwrap_or(0);
        // SAFETY: that many handles were just written, and there is room for as many again behind them.
        unsafe {
            objects.add(found).copy_from_nonoverlapping(objects, found);
            *count *= 2;
        }
    }
    code
}

pub(crate) fn attribute_value(
    shim: &Shim,
    session: CK_SESSION_HANDLE,
    object: CK_OBJECT_HANDLE,
    attributes: *mut CK_ATTRIBUTE,
    count: CK_ULONG,
) -> CK_RV {
    let orders = shim.state().orders.clone();
    // SAFETY: the application's own arguments.
    let code = forward(shim.real().C_GetAttributeValue, |value| unsafe {
        value(session, object, attributes, count)
    });
    let readable = [CKR_OK, CKR_ATTRIBUTE_SENSITIVE, CKR_BUFFER_TOO_SMALL].contains(&code);
    let len = usize::try_from(count).unwrap_or(0);
    if orders.lies.is_empty() || !readable || attributes.is_null() || len == 0 {
        return code;
    }
    // SAFETY: the application's array of that many attributes, which the module has just read and filled.
    let attributes = unsafe { std::slice::from_raw_parts_mut(attributes, len) };
    for (kind, value) in &orders.lies {
        for attribute in attributes.iter_mut().filter(|attribute| attribute.type_ == *kind) {
            lie(attribute, value);
        }
    }
    let sensitive = |attribute: &CK_ATTRIBUTE| attribute.ulValueLen == CK_UNAVAILABLE_INFORMATION;
    if attributes.iter().any(sensitive) { code } else { CKR_OK }
}

fn lie(attribute: &mut CK_ATTRIBUTE, value: &[u8]) {
    // The application's buffer has the length of what it expects, which for the values that we lie about is ours.
    if !attribute.pValue.is_null() && attribute.ulValueLen as usize >= value.len() {
        // SAFETY: the buffer is at least as long as its length says, which was compared.
        unsafe { attribute.pValue.cast::<u8>().copy_from(value.as_ptr(), value.len()) };
    }
    attribute.ulValueLen = value.len() as CK_ULONG;
}

fn forget_sessions(shim: &Shim, code: CK_RV) -> CK_RV {
    if code == CKR_OK {
        let mut state = shim.state();
        state.open.clear();
        state.dead.clear();
        state.pending.clear();
        shim.note_sessions(&state);
    }
    code
}
