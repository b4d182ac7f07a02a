// Points of "Inspect Nested Attention" by clicks: a button on the node opens the picture that it inspected last.

import { app } from "../../scripts/app.js"
import { api } from "../../scripts/api.js"

const NODE = "NestedAttentionInspect"
const WORDS = {
    en: {
        pick: "pick points",
        help: "Click to add a point, click a point to remove it. Then queue again.",
        done: "Done",
        clear: "Clear",
        before: "Queue the workflow once; then points can be picked in its picture.",
    },
    zh: {
        pick: "选取点",
        help: "点击添加一个点，点击已有的点将其删除。然后再次运行。",
        done: "完成",
        clear: "清除",
        before: "请先运行一次工作流，然后即可在图中选取点。",
    },
}

const words = () => WORDS[app.extensionManager.setting.get("Comfy.Locale")] ?? WORDS.en

/** "0.4,0.3; 0.5,0.6" to [[0.4, 0.3], [0.5, 0.6]]; full-width marks too; what is no point is left out. */
function parse(text) {
    const pairs = text.normalize("NFKC").split(";").map((part) => part.split(",").map(parseFloat))
    return pairs.filter((pair) => pair.length === 2 && pair.every(Number.isFinite))
}

const format = (points) => points.map((point) => point.map((x) => Number(x.toFixed(3))).join(",")).join("; ")

function pick(node, picture) {
    const { help, done, clear, before } = words()
    if (!picture) {
        app.extensionManager.toast.add({ severity: "info", summary: before, life: 6000 })
        return
    }
    const widget = node.widgets.find((widget) => widget.name === "points")
    const states = [] // the points after each change, for undo
    const points = () => states.at(-1)

    const dialog = document.createElement("dialog")
    dialog.className = "nested-attention-points"
    dialog.style.cssText = "margin: auto; padding: 16px; border-radius: 8px; border: 0"
    const place = document.createElement("div")
    place.style.cssText = "position: relative; width: fit-content; cursor: crosshair; margin: 8px 0"
    const image = document.createElement("img")
    image.src = api.apiURL(`/view?${new URLSearchParams(picture)}`)
    image.style.cssText = "display: block; height: 70vh; max-width: 85vw; object-fit: fill; image-rendering: pixelated"
    place.append(image)

    const field = document.createElement("input")
    field.style.cssText = "width: 100%; box-sizing: border-box; margin-bottom: 8px"
    field.oninput = () => {
        states.push(parse(field.value))
        mark()
    }

    function change(changed) {
        states.push(changed)
        show()
    }

    function show() {
        mark()
        field.value = format(points())
        field.focus() // While a text field has it, the front end's undo leaves the graph alone.
    }

    function mark() {
        place.querySelectorAll("button").forEach((number) => number.remove())
        points().forEach(([x, y], i) => {
            const number = document.createElement("button")
            number.textContent = i + 1
            number.style.cssText =
                "position: absolute; width: 22px; height: 22px; border-radius: 50%; border: 2px solid white;" +
                `padding: 0; background: #d6336c; color: white; font: 12px/1 sans-serif; translate: -50% -50%;` +
                `left: ${100 * x}%; top: ${100 * y}%`
            number.onclick = (event) => {
                event.stopPropagation()
                change(points().toSpliced(i, 1))
            }
            place.append(number)
        })
    }

    image.onclick = (event) => {
        change([...points(), [event.offsetX / image.clientWidth, event.offsetY / image.clientHeight]])
    }
    const button = (text, onclick) => Object.assign(document.createElement("button"), { textContent: text, onclick })
    const finish = button(done, () => {
        widget.value = format(points())
        widget.callback?.(widget.value)
        app.graph.setDirtyCanvas(true, true)
        dialog.close()
    })
    const empty = button(clear, () => change([]))
    for (const each of [finish, empty]) each.style.cssText = "margin-right: 8px; padding: 4px 16px"
    dialog.append(help, place, field, finish, empty)
    dialog.onkeydown = (event) => {
        event.stopPropagation()
        if (event.ctrlKey || event.metaKey) field.focus() // before the other key of a pair comes
        if (event.key === "Escape") dialog.close() // and changes nothing
        if (event.key !== "z" || !(event.ctrlKey || event.metaKey)) return
        event.preventDefault()
        if (states.length > 1) states.pop()
        show()
    }
    dialog.onclose = () => dialog.remove()
    document.body.append(dialog)
    dialog.showModal()
    change(parse(widget.value))
}

app.registerExtension({
    name: "nested_attention.points",
    nodeCreated(node) {
        if (node.comfyClass !== NODE) return
        let picture
        const last = () => picture ?? app.nodeOutputs?.[node.id]?.generated?.[0] // of the node before an undo made it anew
        const before = node.onExecuted
        node.onExecuted = function (output) {
            before?.apply(this, arguments)
            picture = output.generated?.[0] ?? picture
        }
        // Its value is no input: it must not count among the saved ones.
        node.addWidget("button", words().pick, null, () => pick(node, last()), { serialize: false }).serialize = false
    },
})
