// What the pack has to say of a node, on the node: it stays until the node runs again or says something else.

import { app } from "../../scripts/app.js"
import { api } from "../../scripts/api.js"

const EVENT = "nested_attention.notice"
let run = 0

/** The nodes that an id of the running graph leads through: "4:7" is node 7 of the subgraph that node 4 stands for. */
function nodesOf(id) {
    const nodes = [{ subgraph: app.rootGraph ?? app.graph }]
    for (const part of String(id).split(":")) nodes.push(nodes.at(-1)?.subgraph?.getNodeById(Number(part)))
    return nodes.slice(1)
}

const nodeOf = (id) => nodesOf(id).at(-1)

const noticeOf = (node) => node?.widgets?.find((widget) => widget.name === EVENT)

function show({ node_id, text, warning }) {
    const nodes = nodesOf(node_id)
    const node = nodes.at(-1)
    if (!node) return
    // A subgraph node shows no widgets but its inputs: from outside, what is on a node within is not seen.
    if (warning && nodes.length > 1 && !noticeOf(node)?.element.textContent.includes(text)) {
        const summary = nodes.map((each) => each.title).join(" / ")
        app.extensionManager.toast.add({ severity: "warn", summary, detail: text })
    }
    const widget = noticeOf(node) ?? addNotice(node)
    // In one run several samplers may speak: warnings add up, and what else is said does not hide them.
    const before = widget.run === run && widget.warns ? widget.element.textContent : ""
    if (before && (!warning || before.includes(text))) return
    widget.element.textContent = before ? `${before}\n${text}` : text
    Object.assign(widget, { run, warns: warning })
}

function addNotice(node) {
    const element = document.createElement("div")
    element.style.cssText =
        "white-space: pre-wrap; overflow-y: auto; box-sizing: border-box; padding: 4px 8px; font-size: 12px;" +
        "line-height: 1.4; user-select: text; color: var(--input-text); background: var(--comfy-input-bg)"
    const widget = node.addDOMWidget(EVENT, EVENT, element, { serialize: false, getMinHeight: () => 64 })
    widget.serialize = false // its value is no input: it must not count among the saved ones
    node.setDirtyCanvas(true, true)
    return widget
}

app.registerExtension({
    name: "nested_attention.notices",
    setup() {
        api.addEventListener(EVENT, ({ detail }) => show(detail))
        api.addEventListener("execution_start", () => run++)
        api.addEventListener("executing", ({ detail }) => {
            const node = detail && nodeOf(detail)
            if (noticeOf(node)) node.removeWidget(noticeOf(node))
        })
    },
})
